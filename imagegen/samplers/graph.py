"""The loop as one captured CUDA graph: the model, the step, and a counter on the device that says which row is next."""

import torch

from .. import ops
from .evaluate import evaluate, new_state, scaled_input


class GraphLoop:
    """State, table and counter live on the device at fixed addresses; `advance` is one step of them, without a
    synchronisation. `run` captures it once and replays it for every row."""

    def __init__(self, model, sampler, x, settings):
        self.model, self.sampler, self.settings = model, sampler, settings
        self.state = new_state(x, sampler.slots)
        self.table = torch.tensor(sampler.table, device=x.device)
        self.counter = torch.zeros((), dtype=torch.int64, device=x.device)
        self.model_input = scaled_input(x, sampler.input_scale, sampler, settings["model_input_dtype"])

    def advance(self):
        t = self.table[:, 0].index_select(0, self.counter.reshape(1))[0]  # table[counter] would wait for the device
        outputs = evaluate(self.model, self.model_input, t, self.sampler)
        model_input = ops.sampler_step_(self.state, row=self.table, step=self.counter, **outputs, **self.settings)
        self.model_input.copy_(model_input)
        self.counter += 1

    def run(self, rows, callback=None):
        with torch.cuda.device(self.state.device):
            graph = self._captured()
            for i in rows:
                graph.replay()
                if callback is not None:
                    callback(i, self.state[0])
            return self.state[0].clone()

    def _captured(self):
        """The graph of `advance`. Warming up on a side stream moves the state, which is put back before the capture."""
        kept = [tensor.clone() for tensor in (self.state, self.counter, self.model_input)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.advance()
                self.counter.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip((self.state, self.counter, self.model_input), kept, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance()
        return graph
