"""The command line: each command parses its options, calls one function and prints what it returns.

Imports of the engine are made inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from co2s_fast.cli_shared import PATH, offline_option, one_line_errors
from co2s_fast.cli_weights import weights
from co2s_fast.errors import DataError
from co2s_fast.methods import METHODS
from co2s_fast.version import __version__

precision_option = click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]),
                                help="Of the students' arithmetic; auto: bfloat16 on a GPU, for "
                                "maps also on a CPU that computes in it, else float32. Default: "
                                "the run's own setting.")  # fmt: skip
checkpoint_option = click.option("--checkpoint", type=click.Choice(["best", "last"]),
                                 default="best", show_default=True)  # fmt: skip


ABOVE_0 = click.FloatRange(min=0, min_open=True)
PROFILES = ["official", "official-infer", "official-train"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="co2s-fast")
def main() -> None:
    """Train, evaluate and apply two-student semi-supervised segmentation of imagery.

    \b
    co2s-fast train --dataset demo                      a first run, on the CPU, no download
    co2s-fast train --dataset potsdam --ratio 1/32      a paper experiment
    co2s-fast train --dataset mine.yaml --labels 20     your own folder of imagery
    """  # noqa: D301, click's mark for lines as they are
    if not sys.stderr.isatty():  # in a log, bars that move twice a minute; tqdm reads this first
        os.environ.setdefault("TQDM_MININTERVAL", "30")


@main.command()
@click.option("--dataset", help="A name from `data list`, or a YAML file that describes your own.")
@click.option("--data-root", type=PATH, help="Prepared dataset folder (images/, labels/, splits/).")
@click.option("--ratio", help="Share of labelled images, as 1/32 or 0.03.")
@click.option("--labels", type=int, help="Number of labelled images, instead of a ratio.")
@click.option("--split", type=PATH, help="Folder with labeled.txt, unlabeled.txt and val.txt.")
@click.option("--method", help=f"co2s (the default), {', '.join(list(METHODS)[1:])}.")
@click.option("--recipe", help="A recipe's name or YAML file; by default the dataset's own.")
@click.option("--seed", type=int, help="Fixes weights, augmentation and order. Which "
              "images are labelled: --set data.split_seed=1.")
@click.option("--seeds", metavar="0,1,2", help="One run a seed, in --out/seed-0, ..., on the same "
              "labelled images; then their mean and spread.")
@click.option("--gpu-mem", metavar="SIZE", help="Memory of each GPU, as 24G, or auto: what is "
              "free. Where a step takes more, parts of it are computed again in the backward pass, "
              "or the batch goes through in parts. Same as --set train.gpu_memory=24G.")
@click.option("--deterministic", is_flag=True, help="Bit-equal repetitions on a GPU, too, where "
              "torch can; it warns where not. Same as --set train.deterministic=true.")
@click.option("--loader", type=click.Choice(["auto", "torch", "dali"]),
              help="Input pipeline. Default: DALI on a GPU where it is installed, else torch.")
@click.option("--compile", is_flag=True, help="torch.compile the students: the first step takes "
              "minutes, those after it less. Same as --set train.compile=true.")
@click.option("--class-weight", metavar="RULE|FILE",
              help="Weights of the classes in the supervised loss: none (the default), "
              "median-frequency (or balanced), effective-number, or a YAML or JSON file.")
@click.option("--sampling", type=click.Choice(["uniform", "class-aware"]),
              help="How labelled crops are chosen; class-aware: rare classes more often.")
@click.option("--compat", type=click.Choice(PROFILES), help="Train as the authors' release does; "
              "prints what that changes.")
@click.option("--trainable", type=click.Choice(["attention", "full", "frozen", "lora"]),
              help="What learns of every backbone; the paper's recipes: attention.")
@click.option("--clip", multiple=True, metavar="NAME|FILE",
              help="Weights of the CLIP student: a name of `weights list`, or a file. Given twice: "
              "students clip and clip2.")
@click.option("--ssm", multiple=True, metavar="NAME|FILE",
              help="Weights of the self-supervised student. Given twice: students ssm and ssm2.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Change one configuration value, e.g. --set train.steps=500. Repeatable.")
@click.option("--out", type=PATH, help="Run folder. Default: runs/<dataset>-<split>-<method>.")
@click.option("--pretrained", type=PATH, help="Folder that `pretrain` wrote, to start from.")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint, "
              "with the settings of its config.yaml. Data that has moved: --data-root, --dataset.")
@click.option("--resume-if-exists", is_flag=True,
              help="As --resume when --out holds a run, start one otherwise.")
@click.option("--dry-run", is_flag=True, help="Check configuration and data, train "
              "nothing. A split that is missing is made, and so is the demo dataset.")
@offline_option
@one_line_errors
def train(seeds: str | None, **options: Any) -> None:
    """Train both students and write a run folder, with an evaluation and a report at the end.

    \b
    co2s-fast train --dataset demo --out runs/demo
    co2s-fast train --dataset potsdam --ratio 1/32 --data-root data/potsdam
    co2s-fast train --dataset whdld --ratio 1/24 --clip clip-openai --ssm mae
    torchrun --nproc-per-node=2 -m co2s_fast train --dataset potsdam --ratio 1/32
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.engine.launch import evaluate_run, options_of_each, train_from_options
    from co2s_fast.report import comparison_table, write_comparison, write_report

    runs = []
    for each in options_of_each(seeds, options):
        run = train_from_options(**each)
        if run is not None:
            runs.append(run)
            click.echo(evaluate_run(run, student="all"))
            click.echo(write_report(run))
    if seeds is not None and runs:
        click.echo(comparison_table(runs))
        click.echo(write_comparison(runs, runs[0].parent / "comparison.html"))


@main.command()
@click.option("--dataset", help="A name from `data list`, or a YAML file that describes your own.")
@click.option("--data-root", type=PATH, help="Prepared dataset folder (images/, labels/, splits/).")
@click.option("--ratio", help="As for `train`, whose unlabelled images are taken.")
@click.option("--labels", type=int, help="Number of labelled images, instead of a ratio.")
@click.option("--split", type=PATH, help="Folder with labeled.txt, unlabeled.txt and val.txt.")
@click.option("--recipe", help="A recipe's name or YAML file; by default the dataset's own.")
@click.option("--seed", type=int, help="Fixes weights, order and masks.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Change one configuration value, e.g. --set pretrain.steps=500. Repeatable.")
@click.option("--out", type=PATH, required=True, help="Folder for the weights.")
@offline_option
@one_line_errors
def pretrain(**options: Any) -> None:
    """Pretrain students that start from random weights, on the unlabelled training images.

    \b
    co2s-fast pretrain --dataset mine.yaml --labels 20 --out weights/mine
    co2s-fast train --dataset mine.yaml --labels 20 --pretrained weights/mine
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.engine.launch import pretrain_from_options

    for path in pretrain_from_options(**options):
        click.echo(path)


@main.command("import-checkpoint")
@click.argument("checkpoints", nargs=-1, required=True, type=PATH)
@click.option("--dataset", required=True, help="The dataset the checkpoints were trained on.")
@click.option("--data-root", type=PATH, help="Prepared dataset folder (images/, labels/, splits/).")
@click.option("--ratio", help="Share of labelled images of the run, where it is trained on.")
@click.option("--split", type=PATH, help="Folder with labeled.txt, unlabeled.txt and val.txt.")
@click.option("--compat", type=click.Choice(PROFILES), default="official-infer", show_default=True,
              help="official-train and official: also train on as the release does.")
@click.option("-o", "--out", type=PATH, required=True, help="Run folder to make.")
@one_line_errors
def import_checkpoint(
    checkpoints: tuple[Path, ...], dataset: str, out: Path, compat: str, **options: Any
) -> None:
    """Turn the released Co2S checkpoints into a run that eval, predict and train take.

    \b
    co2s-fast import-checkpoint best_clip.pth best_dinov3.pth --dataset potsdam -o runs/released
    co2s-fast eval runs/released
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.engine.imported import import_checkpoints
    from co2s_fast.engine.launch import nested_options

    click.echo(import_checkpoints(checkpoints, dataset, out, nested_options(options), compat))


@main.command("eval")
@click.argument("run", type=PATH)
@click.option("--student", metavar="NAME|both|all", help="Which prediction to score: a student "
              "(clip, ssm), or the mean of both. Default: the run's own setting, all.")
@checkpoint_option
@click.option("--mode", type=click.Choice(["auto", "whole", "sliding"]),
              help="Whole images or sliding windows. Default: the run's own setting.")
@click.option("--data-root", type=PATH, help="Where the dataset stands now, if it has moved; with "
              "--split, another one of the same classes.")
@click.option("--split", type=PATH, help="Score the images of another folder's val.txt, say of a "
              "test set; written to RUN/eval-<folder>.json.")
@precision_option
@click.option("--compat", type=click.Choice(["official-infer"]),
              help="Score as the authors' release does, whatever the run was trained with.")
@offline_option
@one_line_errors
def evaluate(run: Path, **options: Any) -> None:
    """Score a run on its validation images: per-class IoU, mIoU, F1, accuracy, kappa."""
    from co2s_fast.engine.launch import evaluate_run

    click.echo(evaluate_run(run, **options))


@main.command()
@click.argument("run", type=PATH)
@click.argument("images", nargs=-1, metavar="[IMAGE|FOLDER|GLOB]...")
@click.option("-o", "--out", type=PATH, required=True, help="Folder to write the maps to; for one "
              "image also the map's own name.")
@click.option("--val", "validation", type=click.IntRange(min=1), metavar="N",
              help="Predict the first N validation images of the run instead.")
@click.option("--student", default="both", show_default=True, metavar="NAME|both",
              help="One student (clip, ssm), or the mean of both.")
@checkpoint_option
@click.option("--scale", type=ABOVE_0, help="Factor on an image's size before it goes through the "
              "students. Default: what the dataset's tiles were cut at.")
@click.option("--overlay", is_flag=True, help="Also write the map blended over the image.")
@click.option("--confidence", is_flag=True, help="Also write the largest probability, times 255.")
@click.option("--polygons", is_flag=True, help="Also write a GeoPackage (GeoTIFFs only).")
@click.option("--shard", metavar="I/N", help="Take the I-th of N shares of the images.")
@precision_option
@click.option("--overwrite", is_flag=True, help="Do again the maps that are there already.")
@offline_option
@one_line_errors
def predict(run: Path, images: tuple[str, ...], **options: Any) -> None:
    """Write a class map for every image: PNG for PNG and JPEG, GeoTIFF for GeoTIFF.

    A GeoTIFF of any size passes through in windows; its map is a cloud-optimised GeoTIFF over the
    same ground. Given again after a stop, the command goes on with what is missing.

    \b
    co2s-fast predict runs/mine scene.tif -o maps --confidence --polygons
    co2s-fast predict runs/mine 'scenes/*.tif' -o maps --shard 2/8
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.engine.launch import predict_run

    for path in predict_run(run, images, **options):
        click.echo(path)


@main.command()
@click.argument("run", type=PATH)
@click.option("--format", type=click.Choice(["onnx", "pt2"]), default="onnx", show_default=True,
              help="onnx for onnxruntime and others, pt2 for torch.export.load.")
@click.option("--student", default="both", show_default=True, metavar="NAME|both",
              help="One student (clip, ssm), or both fused: mean of probabilities.")
@click.option("--output", type=click.Choice(["probabilities", "labels"]), default="probabilities",
              show_default=True, help="labels: class of each pixel, and its probability.")
@click.option("--tile", type=click.IntRange(min=1), metavar="PIXELS",
              help="Side of the images the file takes. Default: the run's crop.")
@click.option("--opset", type=click.IntRange(18), default=18, show_default=True,
              help="ONNX operator set.")
@checkpoint_option
@click.option("-o", "--out", type=PATH, help="Default: RUN/export/<student>.<format>.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-4, show_default=True,
              help="Largest difference of a probability from the run's own that passes.")
@one_line_errors
def export(run: Path, **options: Any) -> None:
    """Write the students as one ONNX or torch.export file, and compare it with the run.

    The file takes uint8 images [batch, channels, tile, tile] in any number, or the numbers of
    stretched rasters as float32; stretch, normalisation, upsampling and fusion are inside. It
    appears only if it predicts what the run predicts.
    """
    from co2s_fast.engine.export import export_run

    click.echo(export_run(run, **options))


@main.command()
@click.argument("run", type=PATH)
@click.argument("image", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The figure: .png, .pdf or .svg.")
@click.option("--student", default="both", show_default=True, metavar="NAME|both",
              help="One student (clip, ssm), or each of them.")
@click.option("--layer", type=int, default=-1, show_default=True, help="Number of the block; -1 is "
              "the last whose attention the student uses.")
@click.option("--point", metavar="X,Y", help="Draw the attention of the patch at this pixel of the "
              "image. Default: of the class token.")
@click.option("--size", type=click.IntRange(min=16), metavar="PIXELS", help="Largest side of the "
              "part that goes through the students. Default: the run's crop.")
@click.option("--scale", type=ABOVE_0, help="As for `predict`.")
@checkpoint_option
@click.option("--npz", is_flag=True, help="Also write the maps of all layers, as OUT.npz.")
@one_line_errors
def attention(run: Path, image: Path, out: Path, point: str | None, **options: Any) -> None:
    """Draw where the heads of both students' backbones look in an image.

    \b
    co2s-fast attention runs/mine scene.tif -o attention.png
    co2s-fast attention runs/mine scene.tif -o water.png --point 512,300 --size 512
    """  # noqa: D301, click's mark for lines as they are
    from co2s_fast.engine.attention import attend, parse_point
    from co2s_fast.report import draw_attention

    found = attend(run, image, out=out, point=parse_point(point), **options)
    click.echo(draw_attention(found, out))


@main.command()
@click.argument("run", type=PATH)
@one_line_errors
def report(run: Path) -> None:
    """Write RUN/report.html: curves, scores, confusion matrix and pictures in one file.

    The numbers of the curves are in RUN/metrics.csv.
    """
    from co2s_fast.report import write_report

    click.echo(write_report(run))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("-o", "--out", type=PATH, default=Path("comparison.html"), show_default=True)
@one_line_errors
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Put several runs side by side; runs that differ only by seed become a mean and a spread."""
    from co2s_fast.report import comparison_table, write_comparison

    page = write_comparison(list(runs), out)
    click.echo(comparison_table(runs))
    click.echo(page)


@main.command()
@one_line_errors
def doctor() -> None:
    """Say what is installed, which backends are live, and how to mend those that are not."""
    from co2s_fast.engine.doctor import diagnose

    click.echo(diagnose())


main.add_command(weights)


@main.group()
def data() -> None:
    """List, describe, prepare, split and check datasets."""


@data.command("list")
@one_line_errors
def list_datasets() -> None:
    """Show the catalogue: classes, counts, licence, where to get each dataset."""
    from co2s_fast.data import describe_catalogue

    click.echo(describe_catalogue())


@data.command()
@click.argument("raw", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The description, a .yaml file.")
@click.option("--name", help="Of the dataset. Default: the file's.")
@click.option("--images", metavar="TEMPLATE", help='Where the images are, e.g. '
              '"{scene}/rgb/{part}.tif". Default: guessed from folders and names.')
@click.option("--labels", metavar="TEMPLATE", help='Where the masks are, e.g. '
              '"{scene}/masks/{part}.png"; of the fields of --images.')
@one_line_errors
def describe(raw: Path, out: Path, **options: Any) -> None:
    """Propose the description of a raw folder, for `prepare`.

    Images and masks are told apart by the names of files and folders; without such masks, files of
    polygons (GeoPackage, GeoJSON, ...) are masks. Classes that have no names get numbers for names:
    rename them.
    """
    from co2s_fast.data import describe_folder

    click.echo(describe_folder(raw, out, **options))


@data.command()
@click.argument("dataset")
@click.option("--raw", type=PATH, help="Folder with the raw release or your own files.")
@click.option("--out", type=PATH, required=True, help="Folder for images/, labels/, dataset.yaml.")
@click.option("--bands", metavar="4,3,2", help="Bands of the rasters that make the channels, "
              "counted from 1, in place of `bands` in the description.")
@click.option("--stretch", type=click.Choice(["auto", "percentile", "minmax", "none"]),
              help="How numbers become [0, 1], in place of `raster.stretch` in the description.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that was prepared from something "
              "else, its splits included.")
@one_line_errors
def prepare(dataset: str, raw: Path | None, out: Path, overwrite: bool, **options: Any) -> None:
    """Turn raw files into the layout that `train` reads (DATASET: a name or a YAML file)."""
    from co2s_fast.data import load_dataset, prepare_dataset
    from co2s_fast.data.catalogue import change_bands

    spec = change_bands(load_dataset(dataset), **options)
    click.echo(prepare_dataset(spec, raw, out, overwrite=overwrite))


@data.command()
@click.argument("root", type=PATH)
@click.option("--ratio", help="Share of labelled images, as 1/16 or 0.06.")
@click.option("--labels", type=int, help="Number of labelled images, instead of a ratio.")
@click.option("--seed", type=int, default=0, show_default=True)
@one_line_errors
def split(root: Path, ratio: str | None, labels: int | None, seed: int) -> None:
    """Write labeled.txt, unlabeled.txt and val.txt for a prepared folder."""
    from co2s_fast.data import split_dataset

    click.echo(split_dataset(root, ratio=ratio, labels=labels, seed=seed))


@data.command()
@click.argument("root", type=PATH)
@click.option("--split", type=PATH, help="Also check the lists in this folder.")
@click.option("--deep", is_flag=True,
              help="Decode every file and look for pictures in both training and validation.")
@click.option("--json", "json_path", is_flag=False, flag_value="-", metavar="[FILE]",
              help="Write the findings to FILE as JSON; without FILE, print JSON instead of the "
              "table. --deep writes ROOT/check.json unless told otherwise.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. Default: one a core.")
@one_line_errors
def check(root: Path, split: Path | None, deep: bool, json_path: str | None,
          workers: int | None) -> None:
    """Look at every image and mask: sizes, pixels per class, problems. Exits with 1 on problems."""
    from co2s_fast.data import check_dataset

    path = root / "check.json" if deep and json_path is None else json_path
    found = check_dataset(root, split=split, level="deep" if deep else "quick", workers=workers,
                          json_path=None if path in (None, "-") else Path(path))
    click.echo(found.to_json() if path == "-" else found)
    if found.problems:
        sys.exit(DataError.exit_code)


if __name__ == "__main__":
    main()
