import pytest
import torch

from imagegen.train import save_grid

Image = pytest.importorskip("PIL.Image")
GAP = 8


def test_a_row_per_class(tmp_path):
    """Seven images of three classes: image i stands in row i % 3, and the last places stay empty."""
    values = torch.linspace(-1, 1, 7)
    save_grid(values.reshape(7, 1, 1, 1).expand(7, 1, 8, 8), tmp_path / "new" / "grid.png", rows=3, cell=8)
    grid = Image.open(tmp_path / "new" / "grid.png")
    side = 8 + GAP
    assert (grid.mode, grid.size) == ("L", (3 * side + GAP, 3 * side + GAP))
    for i, value in enumerate(values):
        centre = (i // 3 * side + side // 2, i % 3 * side + side // 2)
        assert abs(grid.getpixel(centre) - (float(value) + 1) * 127.5) < 0.51


def test_colour_is_enlarged(tmp_path):
    save_grid(torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16), tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (64 + 2 * GAP, 64 + 2 * GAP)
    assert grid.getpixel((30, 30)) == (255, 0, 0)


def test_other_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images must have the shape \(N, 1 or 3, H, W\), got \(2, 2, 8, 8\)"):
        save_grid(torch.zeros(2, 2, 8, 8), tmp_path / "grid.png")
