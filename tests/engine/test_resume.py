"""Going on with a run: with what it was begun with, and from a checkpoint that is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_trainer import assert_same_weights, start

from co2s_fast.engine.config import RunConfig, read_run_config
from co2s_fast.engine.launch import options_of_each, train_from_options
from co2s_fast.errors import DataError, UsageError


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def own_data(run_content, stripes, tmp_path):
    """Content of a run on a copy of the data, and the folder of the copy."""
    root = shutil.copytree(stripes, tmp_path / "data")
    content = run_content()
    content["data"] |= {"dataset": str(root / "stripes.yaml"), "root": str(root),
                        "split": str(root / "split")}  # fmt: skip
    return content, root


def rewrite(path: Path, change) -> None:
    """Change the lines of a list in place."""
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


CHANGES = {"fewer": lambda lines: lines[:-1], "reversed": lambda lines: lines[::-1],
           "exchanged": lambda lines: [*lines[1:], lines[0]]}  # fmt: skip


@pytest.mark.parametrize("sampling", ["uniform", "class-aware"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["labeled", "unlabeled", "val"])
def test_another_list_is_not_gone_on_with(own_data, stop_after, name, change, sampling) -> None:
    content, root = own_data
    content["data"] |= {"batch_size": 2, "sampling": sampling, "missing_classes": "warn"}
    stop_after(1, RunConfig.model_validate(content))
    path = root / f"split/{name}.txt"
    before = len(path.read_text().splitlines())
    rewrite(path, CHANGES[change])
    now = len(path.read_text().splitlines())
    others = "" if now < before else ", but others or in another order"
    with pytest.raises(DataError) as caught:
        start(content, resume=True)
    folder = RunConfig.model_validate(content).folder
    assert str(caught.value) == (
        f"{path}: not the list that checkpoint {folder}/checkpoints/last was trained with: "
        f"{before} images then, {now} now{others}; restore it, or begin another run (--out)"
    )


def test_a_checkpoint_without_digests_knows_how_many_were_labelled(own_data, stop_after) -> None:
    content, root = own_data
    content["data"] |= {"batch_size": 2, "sampling": "class-aware", "missing_classes": "warn"}
    config = RunConfig.model_validate(content)
    stop_after(3, config)
    edit(config.folder / "checkpoints/last/state.json", lambda state: state.pop("lists"))
    rewrite(root / "split/labeled.txt", CHANGES["fewer"])
    with pytest.raises(DataError, match=r"labeled\.txt: not the list .*: 4 images then, 3 now;"):
        start(content, resume=True)
    labelled = (root / "split/unlabeled.txt").read_text().splitlines()[0].split()[1]
    first = (root / "split/labeled.txt").read_text().splitlines()
    number = max(int(Path(line.split()[0]).stem) for line in first) + 1
    (root / "split/labeled.txt").write_text(
        "".join(f"{line}\n" for line in [*first, f"images/{number:02}.png {labelled}"])
    )
    start(content, resume=True)


def test_moved_data_with_labels_that_broke_is_gone_on_with(own_data, stop_after, tmp_path) -> None:
    content, root = own_data
    whole = start({**content, "out": str(tmp_path / "whole")})
    stop_after(3, RunConfig.model_validate(content))
    moved = root.rename(tmp_path / "moved")
    (moved / "labels/05.png").unlink()  # of an unlabelled image: only measures pseudo-labels
    (moved / "labels/06.png").write_bytes(b"no picture")
    shutil.copytree(moved / "split", root / "split")
    shutil.copy(moved / "stripes.yaml", root / "stripes.yaml")
    content["data"]["root"] = str(moved)
    folder = start(content, resume=True)
    assert_same_weights(folder, whole)


def resume(run: Path, overrides=(), **options) -> Path | None:
    """What `train --out RUN --resume` does before it scores the run."""
    options = {"recipe": None, "dry_run": False, **options}
    return train_from_options(resume=True, resume_if_exists=False, overrides=overrides, out=run,
                              **options)


@pytest.mark.parametrize("lists", ["labels", "split"])
def test_a_run_goes_on_where_its_prepared_folder_is_now(
    own_data, stop_after, tmp_path, monkeypatch, lists
) -> None:
    content, root = own_data
    (root / "stripes.yaml").rename(root / "dataset.yaml")
    content["data"] |= {"dataset": str(root / "dataset.yaml"), "root": None}
    if lists == "labels":
        content["data"] |= {"split": None, "labels": 4}
    content["train"] |= {"steps": 2, "probe_images": 0}
    config = RunConfig.model_validate(content)
    stop_after(1, config)
    run, moved = config.folder, root.rename(tmp_path / "moved")
    shutil.copytree(moved, tmp_path / "elsewhere/data/stripes")  # of the same name: not it
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"^{root}/images: missing; .* give --data-root"):
        resume(run)
    own = {"split": moved / "split"} if lists == "split" else {}
    assert resume(run, data_root=moved, **own) == run
    now = read_run_config(run)
    assert (now.train, now.students, now.data.root) == (config.train, config.students, moved)
    # The same dataset by other paths, of a run that is trained to its end by now.
    monkeypatch.chdir(tmp_path)
    for path in ("moved/dataset.yaml", str(moved / "dataset.yaml")):
        assert resume(run, dataset=path, data_root=moved, **own) == run
        assert read_run_config(run).data.dataset == path
    with pytest.raises(UsageError, match=r"cannot continue .*: train\.lr: 0\.001 in the run, now"):
        resume(run, ["train.lr=0.5"], dry_run=True)
    other = yaml.safe_load((moved / "dataset.yaml").read_text()) | {"crop": 64}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(UsageError, match=r"data\.dataset: .*moved/dataset\.yaml' in the run, now"):
        resume(run, dataset=str(tmp_path / "other.yaml"), dry_run=True)


def test_seeds_that_begin_later_have_the_settings_of_the_first(tmp_path) -> None:
    first = tmp_path / "seed-0/config.yaml"
    first.parent.mkdir()
    first.write_text("seed: 0\n")
    options = {"resume": True, "resume_if_exists": False, "recipe": None, "out": tmp_path}
    found = options_of_each("0,3", options)
    assert [each["recipe"] for each in found] == [None, str(first)]  # None: its own
    assert all(each["resume_if_exists"] for each in found)
    given = options_of_each("0,3", options | {"recipe": "tiny"})
    assert [each["recipe"] for each in given] == ["tiny", "tiny"]


DAMAGE = {
    "best": (lambda s: s.pop("best"), "without best"),
    "window": (lambda s: s.pop("window"), "without window"),
    "collapse": (lambda s: s.pop("collapse"), "without collapse"),
    "optimizer": (lambda s: s.pop("optimizer"), "without optimizer"),
    "rng": (lambda s: s.pop("rng"), "without rng"),
    "text step": (lambda s: s.update(step="4"), "step: expected a whole number of at least 0, "
                                                "found '4'"),
    "step below 0": (lambda s: s.update(step=-4), "step: expected a whole number of at least 0, "
                                                  "found -4"),
    "bool step": (lambda s: s.update(step=True), "step: expected .*, found True"),
    "later step": (lambda s: s.update(step=7), "step 7 of a run of 6"),
    "empty best": (lambda s: s.update(best={}), "KeyError: 'score'"),
    "empty list": (lambda s: s["lists"].update(val=3), "TypeError"),
    "number for a window": (lambda s: s.update(window=3), "TypeError"),
    "empty optimizer": (lambda s: s.update(optimizer={}), "KeyError: 'scalars'"),
    "optimizer's file": (lambda s: s["files"].update(optimizer=s["files"]["split"]), "ValueError"),
    "generators' file": (lambda s: s["files"].update(rng=s["files"]["split"]), "KeyError: 'torch'"),
    "number for a file": (lambda s: s["files"].update(split=3), "TypeError"),
    "short generator": (lambda s: s["rng"].update(python=[3]), "ValueError"),
    "provenance": (lambda s: s["provenance"].pop("ssm"), "KeyError: 'ssm'"),
}  # fmt: skip


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_state_is_one_line(run_content, stop_after, change) -> None:
    config = RunConfig.model_validate(run_content())
    stop_after(4, config)
    state = config.folder / "checkpoints/last/state.json"
    edit(state, DAMAGE[change][0])
    before = (config.folder / "metrics.jsonl").read_bytes()
    said = rf"^checkpoint .*checkpoints/last is damaged: {DAMAGE[change][1]}"
    with pytest.raises(DataError, match=said) as caught:
        start(run_content(), resume=True)
    assert "\n" not in str(caught.value)
    assert (config.folder / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_does_not_fit_leaves_the_configuration(run_content, stop_after) -> None:
    config = RunConfig.model_validate(run_content())
    stop_after(4, config)
    edit(config.folder / "checkpoints/last/state.json", lambda state: state["rng"].clear())
    before = (config.folder / "config.yaml").read_bytes()
    with pytest.raises(DataError, match="is damaged"):
        start(run_content(log_every=1), resume=True)
    assert (config.folder / "config.yaml").read_bytes() == before


def test_a_damaged_log_is_one_line(run_content, stop_after) -> None:
    config = RunConfig.model_validate(run_content())
    stop_after(4, config)
    log = config.folder / "metrics.jsonl"
    number = len(log.read_text().splitlines()) + 1
    log.write_text(log.read_text() + '{"kind": "train", "step": "5"}\n')
    said = rf"metrics\.jsonl, line {number}: step: expected a whole number, found '5'"
    with pytest.raises(DataError, match=said):
        start(run_content(), resume=True)


def test_a_best_checkpoint_that_is_lost_is_written_again(
    run_content, stop_after, monkeypatch, capsys
) -> None:
    config = RunConfig.model_validate(run_content())
    stop_after(4, config)  # the evaluation of step 3 was the best so far
    state = config.folder / "checkpoints/last/state.json"
    edit(state, lambda content: content["best"].update(score=2.0))  # none will be better
    best = config.folder / "checkpoints/best"
    kept = (best / "state.json").read_bytes()
    start(run_content(), resume=True)
    assert (best / "state.json").read_bytes() == kept
    assert "lost" not in capsys.readouterr().err

    shutil.rmtree(config.folder)
    stop_after(4, config)
    edit(state, lambda content: content["best"].update(score=2.0))
    shutil.rmtree(best)
    start(run_content(), resume=True)
    assert json.loads((best / "state.json").read_text())["step"] == 6
    said = f"warning: {best} has lost the checkpoint of step 3; the next evaluation writes one"
    assert said in capsys.readouterr().err

    shutil.rmtree(best)
    start(run_content(), resume=True)  # finished: no evaluation comes
    said = f"{best} has lost the checkpoint of step 6; give --checkpoint last"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["folder", "state"])
def test_a_run_whose_last_checkpoint_is_lost_is_not_begun_anew(
    run_content, stop_after, lost, capsys
) -> None:
    config = RunConfig.model_validate(run_content())
    last = config.folder / "checkpoints/last"
    start(run_content())
    kept = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()
            and last not in path.parents}
    shutil.rmtree(last) if lost == "folder" else (last / "state.json").unlink()
    with pytest.raises(UsageError, match=r"trained to step 6, but .*last has no state\.json"):
        start(run_content(), resume=True)
    with pytest.raises(UsageError, match="put it back, or begin anew"):
        start(run_content(), resume=True, dry_run=True)
    assert all(path.read_bytes() == content for path, content in kept.items())

    shutil.rmtree(config.folder)
    stop_after(1, config)  # before any evaluation: nothing is lost
    shutil.rmtree(last)
    start(run_content(), resume=True)
    assert "no checkpoint to go on from yet, beginning at step 0" in capsys.readouterr().err
