import torch


def test_tf32_is_off_unless_asked_for():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_tf32_can_be_asked_for(tf32):
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
