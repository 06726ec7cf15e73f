from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """Everything a training run's result depends on; it is kept in the run folder as JSON.

    Args:
        family: a name in `imagegen.models.FAMILIES`.
        data, size: the source and image size, as in `imagegen.data.load`.
        steps: optimizer steps.
        batch_size: images per step, over all processes.
        lr, warmup: AdamW's learning rate grows linearly over `warmup` steps, then falls to 0 along a cosine.
        ema: decay of the moving average of the weights, which is what samples.
        clip_norm: bound on the norm of the gradient.
        bf16: compute the loss under bfloat16 autocast.
        seed: of the initial weights, the order of the data and the noise.
        model: the family's own options.
    """

    family: str
    data: str = "digits"
    size: int | None = None
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.999
    clip_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    model: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "batch_size", "lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Recipe: {name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"Recipe: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"Recipe: ema must be from 0 to below 1, got {self.ema}")
