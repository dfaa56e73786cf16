"""`--compat`: where the authors' release of Co2S differs from their paper, as configuration.

D1 to D17 are the known differences between paper and release; rows named by a topic are habits of
the release that the paper does not mention. "official-infer" sets what scoring the released
checkpoints needs, "official-train" what their training does (its networks included), "official"
both. Each is an override: above the recipe, below `--set`. What is not set, and why:

- D2, D15, D16, D17: see their reasons in `DEVIATIONS`.
- D5, D10, D11, D13: no setting; this package does as the release does.
- Rates, threshold and epochs are the recipes' (`own` and the benchmarks' have the released ones).
  The released loop gives NaN where a labelled batch is ignored altogether; here such a mean is 0.
  Its labelled images are repeated in another order, from no fixed seed, and its text vectors went
  through float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from co2s_fast.methods import get_method

if TYPE_CHECKING:
    from co2s_fast.engine.config import RunConfig

PROFILES: dict[str, frozenset[str]] = {
    "official": frozenset({"infer", "train"}),
    "official-infer": frozenset({"infer"}),
    "official-train": frozenset({"train"}),
}
BOTH, INFER, TRAIN = PROFILES["official"], PROFILES["official-infer"], PROFILES["official-train"]
RELEASED_GPUS = 4

Settings = dict[str, Any]  # dotted key of the configuration -> value


@dataclass(frozen=True)
class Deviation:
    """One difference between paper and release.

    Attributes:
        name: D-number, or topic.
        what: what the release does.
        profiles: in which it is set; none: in no profile.
        settings: of a configuration, the keys that do it; none where there is nothing to set.
        reason: why nothing is set.
    """

    name: str
    what: str
    profiles: frozenset[str] = frozenset()
    settings: Callable[[RunConfig], Settings] = lambda config: {}
    reason: str = ""


def of_method(**values: Any) -> Callable[[RunConfig], Settings]:
    """Options of the method, those that it has."""
    return lambda config: {f"method.{key}": value for key, value in values.items()
                           if key in type(config.method).model_fields}  # fmt: skip


def of_students(backbone: str | None = None, **values: Any) -> Callable[[RunConfig], Settings]:
    """Options of every student, or of those of one kind of backbone."""
    return lambda config: {
        f"students.{name}.{key}": value
        for name, student in config.students.items()
        if backbone in (None, student.backbone)
        for key, value in values.items()
    }


def _sizes(config: RunConfig) -> Settings:
    sides = {"clip": 224, "timm": 256}
    return {f"students.{name}.decoder.resize_to": [sides[student.backbone]] * 2
            for name, student in config.students.items()}  # fmt: skip


def _weights(config: RunConfig) -> Settings:
    """Of co2s alone: defaults of other methods differ, and nothing was released of them."""
    if config.method.name != "co2s":
        return {}
    return of_method(supervised_weight=0.5, fp_weight=0.25, s1_weight=0.125, s2_weight=0.125
                     )(config)  # fmt: skip


def _same_image(config: RunConfig) -> Settings:
    found = of_method(cutmix_partner="same-image", distribution_alignment=0.0,
                      class_thresholds=0.0, consistency_ramp=0.0)(config)  # fmt: skip
    return found | {"data.loader": "torch"} if found else {}


def _averages(config: RunConfig) -> Settings:
    """Not of a method whose own teacher is an average."""
    if get_method(config.method.name).teacher_decay:
        return {}
    return {"train.ema": 0.0} | of_method(teacher="student")(config)


def _dinov3(config: RunConfig) -> Settings:
    """No other timm model has that embedding."""
    return {f"students.{name}.{key}": value for name, student in config.students.items()
            if "dinov3" in student.model or student.model == "tiny-ssm"
            for key, value in (("rope", "bf16"), ("eps", 1e-6))}  # fmt: skip


DEVIATIONS = (
    Deviation("D1", "the stability term is a number in the log and trains nothing", TRAIN,
              of_method(stability_gradient="none")),
    Deviation("D2", "the DINOv3 weights are drawn anew after they were loaded",
              reason="an accident that discards the prior which was asked for; by itself: "
                     "--set students.ssm.reinitialize=true"),
    Deviation("D3", "one factor λ(t), 0.5 after a cosine over the first fifth of the run", TRAIN,
              of_method(stability_weight=0.5, stability_ramp=0.2)),
    Deviation("D4", "logits go through 224 x 224 (CLIP) or 256 x 256 (DINOv3)", BOTH, _sizes),
    Deviation("D5", "unsupervised terms are divided by the pixels that are no padding",
              reason="always so"),
    Deviation("D6", "CutMix pastes another augmentation of the same image", TRAIN, _same_image),
    Deviation("D7", "exact GELU and LayerNorm epsilon 1e-6 in the CLIP tower", BOTH,
              of_students("clip", activation="gelu", eps=1e-6)),
    Deviation("D8", "both students see images normalised as ImageNet's", BOTH,
              of_students(normalization="imagenet")),
    Deviation("D9", "rotary embedding in bfloat16 and LayerNorm epsilon 1e-6 in DINOv3", BOTH,
              _dinov3),
    Deviation("D10", "weight decay on every tensor, norms and biases included",
              reason="always so"),
    Deviation("D11", "scales are relative to a short side of 512, but LoveDA's",
              reason="always so: the datasets' own `scale`"),
    Deviation("D12", "channel dropout of 0.5 on all three maps", TRAIN,
              of_students(feature_dropout=0.5)),
    Deviation("D13", "MSL takes the concepts of MER", reason="always so"),
    Deviation("D14", "the stability term includes the padding of crops", TRAIN,
              of_method(stability_padding="include")),
    Deviation("D15", "the students MAE, BEiT v2, iBOT and SimMIM are named and missing",
              reason="there is no code to reproduce; any timm ViT can be a student here"),
    Deviation("D16", "no code of the baselines",
              reason="there is no code to reproduce; ours share one network"),
    Deviation("D17", "the best epoch on the validation images is reported, each student's own",
              reason="`best` is of the students' mean score and `last` stays beside it; the log "
                     "has every evaluation"),
    Deviation("means", "each of four GPUs divides by its own pixels, then their mean is taken",
              TRAIN, of_method(mean_shards=RELEASED_GPUS)),
    Deviation("passes", "each of four GPUs fills its share of a pass up with images of it", TRAIN,
              lambda config: {"data.epoch_shards": RELEASED_GPUS}),
    Deviation("precision", "training in float32", TRAIN,
              lambda config: {"train.precision": "float32"}),
    Deviation("averages", "the weights of a step are evaluated, and label the unlabelled pixels",
              TRAIN, _averages),
    Deviation("weights", "the paper's factors of the losses", TRAIN, _weights),
    Deviation("scores", "float32, windows at 5/6 of the crop, a class that is absent counts as 0",
              INFER, lambda config: {"eval.precision": "float32", "eval.mode": "auto",
                                     "eval.stride": 5 / 6, "eval.absent": "zero"}),
)  # fmt: skip


def compat_settings(config: RunConfig, compat: str) -> Settings:
    """Every key that a profile sets in a configuration of these students and this method."""
    return {key: value for deviation in DEVIATIONS if deviation.profiles & PROFILES[compat]
            for key, value in deviation.settings(config).items()}  # fmt: skip


def nested(settings: Settings) -> dict[str, Any]:
    """Dotted keys as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, last = path.split(".")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return tree


def describe_compat(config: RunConfig, compat: str) -> list[str]:
    """One line a deviation: what the profile set in this configuration, or why it did not.

    What is in no profile concerns training and is told with it.

    Args:
        config: the final configuration; where it has another value, that was asked for.
        compat: the profile it was made with.
    """
    lines = [f"compat {compat}:"]
    for deviation in DEVIATIONS:
        head = f"  {deviation.name}: {deviation.what}"
        if deviation.reason and "train" in PROFILES[compat]:
            always = deviation.reason.startswith("always")
            lines.append(f"{head} - {'' if always else 'not set: '}{deviation.reason}")
        if not deviation.profiles & PROFILES[compat]:
            continue
        wanted = deviation.settings(config)
        shown = [_shown(config, key, value) for key, value in wanted.items()]
        lines.append(f"{head} - {', '.join(shown) or 'does not apply here'}")
    return lines


def _shown(config: RunConfig, key: str, wanted: Any) -> str:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    value = list(value) if isinstance(value, tuple) else value
    return f"{key}={value}" + ("" if value == wanted else f" (asked for, not {wanted})")
