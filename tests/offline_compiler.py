"""Compile Triton kernels for a GPU that this machine does not have: the package's functions run, and no kernel is started."""

from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class AbsentGpu:
    """A driver of a GPU of which only the compute capability is known."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        raise RuntimeError("there is no GPU")


@contextmanager
def compiling_for(capability):
    """Compile every kernel that is called for a GPU of this compute capability, 86 for 8.6, instead of starting it.

    Yields a dict: the name of a kernel with its constants -> bytes of shared memory of a block. Outputs stay empty.
    """
    compiled, run, active = {}, JITFunction.run, driver._active

    def compile_only(self, *words, grid, warmup, **options):
        kernel = run(self, *words, grid=grid, warmup=True, **options)
        compiled.setdefault(f"{self.__name__} {kernel.hash[:8]}", kernel.metadata.shared)
        return kernel

    driver._active, JITFunction.run = AbsentGpu(capability), compile_only
    try:
        yield compiled
    finally:
        driver._active, JITFunction.run = active, run
