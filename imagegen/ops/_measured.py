"""Which backend is fastest on which GPU; `python -m benchmarks dispatch` writes it from benchmarks/results/."""

# architecture -> op -> (dtype, layout, direction) -> (a forward's FLOP at most, backends from the fastest on), ...
FASTEST = {}
