// The Python module co2s_fast._native: what was built, and raster helpers on NumPy arrays.
// Importing it also registers the kernels of torch.ops.co2s_native.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "ops/cpu/isa.h"
#include "raster.h"

namespace py = pybind11;

namespace co2s {
namespace {

template <class S> using Array = py::array_t<S, py::array::c_style>;

py::dict build_info() {
  py::dict info;
  const std::pair<const char*, const char*> settings[] = CO2S_BUILD_INFO;
  for (const auto& [key, value] : settings) info[key] = value;
  info["instruction_sets"] = compiled_isas();
  info["instruction_set"] = isa_name(chosen_isa());
  return info;
}

std::string shape_text(const py::array& array) {
  return py::str(py::tuple(py::cast(
      std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()))));
}

uint8_t checked_byte(int64_t value, const char* name) {
  if (value < 0 || value > 255) {
    throw py::value_error(std::string(name) + ": expected a number in [0, 255], found " +
                          std::to_string(value));
  }
  return static_cast<uint8_t>(value);
}

// (labels uint8 [H,W], {(r, g, b): pixels})
py::tuple decode_palette_python(const Array<uint8_t>& rgb, const Array<uint8_t>& colors,
                                const Array<uint8_t>& values, int64_t unknown, int64_t limit) {
  if (rgb.ndim() != 3 || rgb.shape(2) != 3) {
    throw py::value_error("rgb: expected shape (H, W, 3), found " + shape_text(rgb));
  }
  if (colors.ndim() != 2 || colors.shape(1) != 3) {
    throw py::value_error("colors: expected shape (N, 3), found " + shape_text(colors));
  }
  if (values.ndim() != 1 || values.shape(0) != colors.shape(0)) {
    throw py::value_error("values: expected one number a colour, found shape " +
                          shape_text(values));
  }
  Palette palette{{}, {values.data(), values.data() + values.size()},
                  checked_byte(unknown, "unknown")};
  for (py::ssize_t i = 0; i < colors.shape(0); ++i) {
    const uint8_t* c = colors.data(i, 0);
    palette.colors.push_back(uint32_t(c[0]) << 16 | uint32_t(c[1]) << 8 | c[2]);
  }
  Array<uint8_t> labels({rgb.shape(0), rgb.shape(1)});
  const uint8_t* from = rgb.data();
  uint8_t* to = labels.mutable_data();
  Undeclared undeclared;
  {
    const py::gil_scoped_release release;
    undeclared = decode_palette(from, rgb.shape(0), rgb.shape(1), palette, limit, to);
  }
  py::dict found;
  for (const auto& [color, pixels] : undeclared) {
    found[py::make_tuple(color >> 16, color >> 8 & 255, color & 255)] = pixels;
  }
  return py::make_tuple(labels, found);
}

LabelTable table_of(const std::map<int64_t, int64_t>& mapping, int64_t unknown) {
  constexpr int64_t kLargest = int64_t(1) << 24; // of a class number in a file; bounds the table
  LabelTable table{{}, {}, checked_byte(unknown, "unknown")};
  for (const auto& [from, to] : mapping) {
    if (from < 0 || from >= kLargest) {
      throw py::value_error("table: expected values in [0, " + std::to_string(kLargest) +
                            "), found " + std::to_string(from));
    }
    table.values.resize(std::max<size_t>(table.values.size(), from + 1));
    table.declared.resize(table.values.size());
    table.values[from] = checked_byte(to, "table");
    table.declared[from] = true;
  }
  return table;
}

// (labels uint8 [H,W], {value: pixels})
template <class S>
py::tuple remap_typed(const py::array& any, const LabelTable& table, int64_t limit) {
  const auto input = Array<S>::ensure(any);
  Array<uint8_t> labels({any.shape(0), any.shape(1)});
  const S* from = input.data();
  uint8_t* to = labels.mutable_data();
  Undeclared undeclared;
  {
    const py::gil_scoped_release release;
    undeclared = remap_labels(from, any.shape(0), any.shape(1), table, limit, to);
  }
  py::dict found;
  for (const auto& [value, pixels] : undeclared) found[py::int_(value)] = pixels;
  return py::make_tuple(labels, found);
}

py::tuple remap_labels_python(const py::array& label, const std::map<int64_t, int64_t>& mapping,
                              int64_t unknown, int64_t limit) {
  if (label.ndim() != 2) {
    throw py::value_error("label: expected shape (H, W), found " + shape_text(label));
  }
  const LabelTable table = table_of(mapping, unknown);
  if (py::isinstance<py::array_t<uint8_t>>(label)) return remap_typed<uint8_t>(label, table, limit);
  if (py::isinstance<py::array_t<uint16_t>>(label)) {
    return remap_typed<uint16_t>(label, table, limit);
  }
  if (py::isinstance<py::array_t<int32_t>>(label)) return remap_typed<int32_t>(label, table, limit);
  throw py::type_error("label: expected uint8, uint16 or int32, found " +
                       std::string(py::str(label.dtype())));
}

} // namespace
} // namespace co2s

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native part of co2s-fast: CPU (and CUDA) kernels, and raster helpers.";
  module.def("build_info", &co2s::build_info,
             "Compiler, flags, torch version, instruction sets and CUDA architectures of this "
             "build, and the instruction set chosen for this machine.");
  module.def("decode_palette", &co2s::decode_palette_python, py::arg("rgb").noconvert(),
             py::arg("colors"), py::arg("values"), py::arg("unknown") = 255,
             py::arg("limit") = 64,
             R"doc(Colours of a mask to numbers.

Args:
    rgb: uint8 [H, W, 3], C-contiguous.
    colors: uint8 [N, 3], the declared colours.
    values: uint8 [N], what each becomes.
    unknown: what any other colour becomes.
    limit: how many distinct undeclared colours to report.

Returns:
    Labels uint8 [H, W], and the undeclared colours as {(r, g, b): pixels}.

Raises:
    ValueError: a shape or a number that cannot be.
    TypeError: rgb is not a C-contiguous uint8 array.
)doc");
  module.def("remap_labels", &co2s::remap_labels_python, py::arg("label"), py::arg("table"),
             py::arg("unknown") = 255, py::arg("limit") = 64,
             R"doc(Numbers of a mask to class ids.

Args:
    label: uint8, uint16 or int32 [H, W].
    table: {number in the mask: class id or ignore_index}, numbers in [0, 2**24).
    unknown: what any other number becomes.
    limit: how many distinct undeclared numbers to report.

Returns:
    Labels uint8 [H, W], and the undeclared numbers as {number: pixels}.

Raises:
    ValueError: a shape or a number that cannot be.
    TypeError: label has another dtype.
)doc");
}
