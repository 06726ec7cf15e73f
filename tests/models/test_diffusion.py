import pytest
import torch

from imagegen import models
from imagegen.models.diffusion import UNet


def small(classes=3, image_shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    model = models.create("diffusion", image_shape, classes, **{"width": 8, "multipliers": (1, 2), **options})
    for parameter in model.parameters():  # the layers that start at zero hide whatever stands before them
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 12, 20)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_network_keeps_the_shape(image_shape, multipliers, blocks):
    C, H, W = image_shape
    unet = UNet(C, classes=2, width=8, multipliers=multipliers, blocks=blocks)
    y = unet(torch.randn(2, C, H, W), torch.tensor([0.0, 999.0]), torch.tensor([0, 2]))
    assert y.shape == (2, C, H, W)


@pytest.mark.parametrize("width", [2, 10, 50])
def test_any_even_width_will_do(width):
    unet = UNet(1, classes=2, width=width, multipliers=(1, 2), blocks=1)
    assert unet(torch.randn(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 1, 4, 4)


def test_every_parameter_gets_a_gradient():
    model = small()
    model(torch.randn(16, 1, 8, 8), torch.arange(16) % 3).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_time_and_label_matter():
    unet = small().unet
    x = torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8)
    y = unet(x, torch.tensor([10.0, 500.0, 10.0]), torch.tensor([0, 0, 1]))
    assert not torch.allclose(y[0], y[1])
    assert not torch.allclose(y[0], y[2])


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
def test_the_loss_of_the_right_answer_is_zero(prediction):
    """A network that knows x_0 can tell epsilon from x_t, and so every target."""
    model = small(prediction=prediction)
    x0 = torch.randn(6, 1, 8, 8)

    def oracle(x_t, t, label):
        alpha, sigma = model.alpha[t].view(-1, 1, 1, 1), model.sigma[t].view(-1, 1, 1, 1)
        epsilon = (x_t - alpha * x0) / sigma
        return {"v": alpha * epsilon - sigma * x0, "epsilon": epsilon, "sample": x0}[prediction]

    model.unet.forward = oracle
    assert model(x0, torch.zeros(6, dtype=torch.int64)) < 1e-6


def test_a_fresh_network_predicts_zero():
    model = models.create("diffusion", (1, 8, 8), 3, width=8, multipliers=(1, 2))
    x0 = torch.ones(256, 1, 8, 8)
    assert abs(model(x0, torch.zeros(256, dtype=torch.int64)) - 1) < 0.1  # |v|^2 averages to 1 here


def test_labels_are_dropped_for_the_null_class():
    seen = []
    model = small(label_dropout=1.0)
    forward = model.unet.forward
    model.unet.forward = lambda x, t, label: seen.append(label) or forward(x, t, label)
    model(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert seen[0].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"sampler": "ddpm"}, {"eta": 0.5}])
def test_samples_depend_on_seed_and_index_alone(options):
    model = small().eval()
    images = model.sample(5, steps=3, seed=1, **options)
    assert images.shape == (5, 1, 8, 8)
    assert images.abs().max() <= 1
    assert torch.equal(images, model.sample(5, steps=3, seed=1, **options))
    assert not torch.equal(images, model.sample(5, steps=3, seed=2, **options))
    in_parts = model.sample(5, steps=3, seed=1, batch_size=2, **options)
    torch.testing.assert_close(images, in_parts, rtol=1e-4, atol=1e-5)


def test_labels_can_be_chosen():
    model = small().eval()
    in_turn = model.sample(3, steps=2)
    torch.testing.assert_close(model.sample(3, steps=2, label=torch.tensor([0, 1, 2])), in_turn)
    assert not torch.allclose(model.sample(3, steps=2, label=torch.tensor([1, 1, 1])), in_turn)


def test_unconditional():
    model = small(classes=0)
    model(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)).backward()
    assert model.sample(2, steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gan9000"}, "family must be one of diffusion, got 'gan9000'"),
        ({"image_shape": (1, 10, 10), "multipliers": (1, 2, 4)}, "3 levels need image sides divisible by 4, got 10x10"),
        ({"width": 7}, "width must be even and positive, got 7"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"schedule": "sine"}, "schedule must be one of cosine, linear, scaled_linear, got 'sine'"),
        ({"prediction": "x"}, "prediction must be one of v, epsilon, sample, got 'x'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(**{"family": "diffusion", "image_shape": (1, 8, 8), "classes": 2} | arguments)
