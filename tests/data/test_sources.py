import gzip

import numpy as np
import pytest
import torch

from imagegen import data


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, n=3, suffix=""):
    pixels = np.arange(n * 28 * 28).reshape(n, 28, 28) % 256
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", pixels)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", np.arange(n))
    return pixels


def test_digits_are_the_1797_of_scikit_learn():
    digits = data.load("digits")
    assert (len(digits), digits.shape, len(digits.classes)) == (1797, (1, 8, 8), 10)
    image, label = digits[0]
    assert (image.dtype, label) == (torch.float32, 0)
    assert (digits.images.min(), digits.images.max()) == (-1, 1)


def test_size_resizes():
    image, _ = data.load("digits", size=16)[5]
    assert image.shape == (1, 16, 16)
    assert image.abs().max() <= 1
    small = torch.nn.functional.avg_pool2d(image, 2)
    assert (small - data.load("digits")[5][0]).abs().mean() < 0.15


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_a_folder(tmp_path, suffix):
    pixels = write_mnist(tmp_path, suffix=suffix)
    images = data.load(f"mnist:{tmp_path}")
    image, label = images[2]
    assert (len(images), images.shape, label) == (3, (1, 28, 28), 2)
    np.testing.assert_allclose(image[0], pixels[2] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("variable", ["XDG_DATA_HOME", "XDG_DATA_DIRS"])
def test_fashion_mnist_from_the_shared_folder(tmp_path, monkeypatch, variable):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv(variable, str(tmp_path))
    write_mnist(tmp_path / "datasets" / "fashion-mnist", suffix=".gz")
    assert data.load("fashion-mnist").classes[9] == "ankle boot"


def test_cifar10(tmp_path):
    records = np.zeros((4, 3073), np.uint8)
    records[:, 0] = [3, 1, 4, 1]
    records[2, 1 + 1024] = 255  # the first green pixel
    records[:2].tofile(tmp_path / "data_batch_1.bin")
    records[2:].tofile(tmp_path / "data_batch_2.bin")
    images = data.load(f"cifar10:{tmp_path}")
    assert (len(images), images.shape) == (4, (3, 32, 32))
    image, label = images[2]
    assert (images.classes[label], image[1, 0, 0], image[0, 0, 0]) == ("deer", 1, -1)


def test_a_folder_of_images(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in [("red", (255, 0, 0)), ("blue", (0, 0, 255))]:
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 20), colour).save(tmp_path / name / "one.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = data.load(str(tmp_path), size=8)
    assert (len(images), images.shape, images.classes) == (2, (3, 8, 8), ("blue", "red"))
    image, label = images[1]
    assert label == 1
    torch.testing.assert_close(image[:, 3, 3], torch.tensor([1.0, -1.0, -1.0]))


def test_a_flat_folder_has_no_classes(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.new("L", (5, 5)).save(tmp_path / "grey.PNG")
    images = data.load(str(tmp_path))
    assert (images.classes, images[0][0].shape) == ((), (3, 64, 64))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_files_say_where_and_how(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "system"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/system/datasets/{name};.*--data {name}:FOLDER"):
        data.load(name)


def test_missing_libraries_name_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.load("digits")
    with pytest.raises(ImportError, match="pip install pillow"):
        data.load(str(tmp_path))


def test_damaged_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"text")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not an IDX file"):
        data.load(f"mnist:{tmp_path}")
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(2))
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        data.load(f"mnist:{tmp_path}")
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is cut off"):
        data.load(f"mnist:{tmp_path}")
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_1.bin is not a CIFAR-10 binary file: 3 bytes"):
        data.load(f"cifar10:{tmp_path}")


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"'letters' is neither one of digits, .* nor a folder"):
        data.load("letters")
    with pytest.raises(FileNotFoundError, match="no images in"):
        data.load(str(tmp_path))
    with pytest.raises(ValueError, match="digits: they come with scikit-learn"):
        data.load("digits:somewhere")
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        data.load("digits", size=0)
