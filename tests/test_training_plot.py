"""The plot of a training log."""

import json

from PIL import Image

from calm_transformers.evaluation.plot import main, read_log

LOG = [
    {"loss": 2.0, "grad_norm": 1.0, "tokens_per_second": 10.0, "epoch": 0.5, "step": 1},
    {"loss": 1.5, "grad_norm": 0.5, "tokens_per_second": 12.0, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.7, "eval_runtime": 3.0, "eval_samples_per_second": 4.0, "epoch": 1.0, "step": 2},
    {"train_runtime": 9.0, "train_loss": 1.75, "total_flos": 0.0, "epoch": 1.0, "step": 2},
]


def write_run(folder, log=LOG):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_several_runs_share_a_plot(tmp_path):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", LOG[:2])]
    assert main([str(run) for run in runs]) == 0
    with Image.open(tmp_path / "one" / "curves.png") as picture:
        width, height = picture.size
        colours = {colour for _, colour in picture.convert("RGB").getcolors(width * height)}
    assert 3.5 < width / height < 5  # three panels in one row
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each run


def test_an_unfinished_run_is_read_from_its_last_checkpoint_and_a_missing_log_raises(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no trainer_state.json" in capsys.readouterr().err
    for step in (9, 10):
        write_run(tmp_path / "run" / f"checkpoint-{step}", [{"loss": float(step), "step": step}])
    assert read_log(tmp_path / "run") == [{"loss": 10.0, "step": 10}]
