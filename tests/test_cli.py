import subprocess
import sys

import pytest

from imagegen import cli

TINY = ["--set", "width=8", "--set", "multipliers=[1, 2]", "--batch-size", "8", "--no-tensorboard"]


def test_train_then_sample(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    run, picture = str(tmp_path / "run"), str(tmp_path / "grid.png")
    assert not cli.main(["train", "diffusion", "--data", "digits", "--steps", "2", "--out", run, *TINY])
    assert not cli.main(["sample", run, "--n", "12", "--seed", "3", "--out", picture, "--set", "steps=2"])
    output, bars = capsys.readouterr()
    assert f"draw from it: python -m imagegen sample {run}" in output
    assert "train: 100%" in bars
    assert "ddim: 100%" in bars
    assert Image.open(picture).size == (2 * 72 + 8, 10 * 72 + 8)  # a row per class


def test_a_run_can_be_resumed_longer(tmp_path):
    command = ["train", "diffusion", "--out", str(tmp_path), *TINY]
    assert not cli.main([*command, "--steps", "1"])
    assert cli.main([*command, "--steps", "2"]) == 1
    assert not cli.main([*command, "--steps", "2", "--resume"])


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.DEMO, "model", {"width": 8, "multipliers": [1, 2]})
    assert cli.main(["demo", "--steps", "1"]) == 0
    assert (tmp_path / "out" / "demo.png").exists()
    assert "python -m benchmarks run --suite ops" in capsys.readouterr().out


def test_demo_runs_the_benchmarks_where_they_are(tmp_path, monkeypatch, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    assert cli._benchmark() == 3
    assert capfd.readouterr().out.strip() == "run --suite ops --quick --no-compile"


def test_info(capsys):
    assert not cli.main(["info"])
    assert "group_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "nowhere"], "imagegen sample: nowhere is not a run folder"),
        (["train", "gan9000", "--out", "x"], "imagegen train: family must be one of diffusion, got 'gan9000'"),
        (["train", "diffusion", "--data", "letters", "--out", "x"], "'letters' is neither one of digits"),
        (["train", "diffusion", "--out", "x", "--steps", "0"], "Recipe: steps must be positive, got 0"),
        (["train", "diffusion", "--out", "x", "--set", "depth=3"], "unexpected keyword argument 'depth'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_options_that_are_not_name_value_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "run", "--set", "steps"])
    assert "expected NAME=VALUE, got 'steps'" in capsys.readouterr().err


def test_importing_stays_cheap():
    optional = ["PIL", "sklearn", "safetensors", "tensorboard", "matplotlib"]
    code = f"import sys, imagegen.cli; print([name for name in {optional} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
