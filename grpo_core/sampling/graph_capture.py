"""Capture any function as a CUDA graph, so that one call launches all of its kernels.

graph_decoder.py captures the computation of a token step with it, modules/module_model.py its trial of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture_graph(function: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Return `function` as a graph, which reads and writes the memory that the function uses now.

    The function is run once before, which capturing requires, and not while it is captured. `pool` is the memory pool
    of the graph.

    Raises:
        RuntimeError: the function waits for the GPU, or does something else that no graph can hold.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph
