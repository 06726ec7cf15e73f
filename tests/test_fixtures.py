import torch


def test_tf32_is_off_unless_asked_for():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_tf32_can_be_asked_for(tf32):
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_memory_past_torchs_own_fill_is_poisoned_too(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    assert bool((torch.empty(1000) > 3e38).all())
    assert bool((torch.empty(1 << 20) > 3e38).all())
