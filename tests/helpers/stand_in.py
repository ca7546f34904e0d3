"""A card that is not there: CUDA's runtime and driver as one library whose calls succeed and do nothing, but count.

For what a GPU's host does (which kernels it launches, and how long that takes it) on a machine without one, with a PyTorch that
was built for CUDA: `environment` for a process of its own, in it `install` before anything is put on the device. Memory of the
device is malloc's, no kernel runs and no number is right. Products are answered in Python, for cuBLAS asks more of a driver
than this: each counts as one launch.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path

import torch

_OWN = r"""
#include <driver_types.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
long launches;
static long made = 1;
static int attribute(int which) {
  switch (which) {
    case 1: case 2: case 3: return 1024;            /* threads of a block */
    case 4: return 64;
    case 5: return 2147483647;                      /* blocks of a grid */
    case 6: case 7: return 65535;
    case 8: return 49152;                           /* shared memory of a block */
    case 10: return 32;                             /* a warp */
    case 12: case 82: return 65536;                 /* registers */
    case 16: return 132;                            /* multiprocessors */
    case 39: return 2048;                           /* threads of one */
    case 75: return 9;                              /* compute capability */
    case 81: return 233472;
    case 97: return 232448;
    case 106: return 32;
    default: return 0;
  }
}
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *n) { *n = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -3; return 0; }
int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { *s = (void *)made++; return 0; }
int cudaEventCreateWithFlags(void **e, unsigned f) { *e = (void *)made++; return 0; }
int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(512, (n + 511) / 512 * 512); return 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaHostAlloc(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
int cudaMemGetInfo(size_t *some, size_t *all) { *some = *all = 80ul << 30; return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) { memcpy(to, from, n); return 0; }
int cudaStreamIsCapturing(void *s, int *is) { *is = 0; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaPointerGetAttributes(void *a, const void *p) { memset(a, 0, 32); *(int *)a = 2; return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) { memset(a, 0, sizeof *a); return 0; }
int cudaDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int b, size_t s) { *n = 2; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, void *f, int b, size_t s, unsigned g) { *n = 2; return 0; }
const char *cudaGetErrorString(int e) { return "the stand-in for CUDA knows no such call"; }
const char *cudaGetErrorName(int e) { return "stand-in"; }
int cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, void *t) { launches++; return 0; }
int __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, void *t) { launches++; return 0; }
int cudaLaunchKernelExC(void *c, void *f, void **a) { launches++; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long fl, int *found) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (found) *found = *f ? 0 : 1;
  return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  const char *name = getenv("STAND_IN_NAME");     /* compilers' caches know a card by it */
  strncpy(p->name, name ? name : "no card", 255);
  p->totalGlobalMem = 80ul << 30;
  p->major = 9;
  p->warpSize = 32;
  p->multiProcessorCount = 132;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  return 0;
}
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *is) { *f = 0; *is = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuModuleLoad(void **m, const char *f) { *m = (void *)made++; return 0; }
int cuModuleLoadData(void **m, const void *f) { *m = (void *)made++; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)made++; return 0; }
int cuFuncGetAttribute(int *v, int which, void *f) { *v = which == 0 ? 1024 : which == 4 ? 32 : 0; return 0; }
int cuPointerGetAttribute(void *v, int which, void *p) { *(void **)v = p; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stand-in"; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "stand-in"; return 0; }
int cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned s, void *t,
                   void **k, void **x) { launches++; return 0; }
int cuLaunchKernelEx(void *c, void *f, void **k, void **x) { launches++; return 0; }
int cuGetProcAddress_v2(const char *name, void **f, int v, unsigned long fl, void *found) {
  *f = dlsym(RTLD_DEFAULT, name);
  return *f ? 0 : 500;
}
"""
_REFUSED = ("cudaGetExportTable", "cuGetExportTable")


def environment(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to see the stand-in, which is built in `folder`. Raises RuntimeError where this
    PyTorch is not one for CUDA, and CalledProcessError where there is no C compiler."""
    packages = Path(torch.__file__).parents[1]
    runtime = next(packages.glob("nvidia/*/lib/libcudart.so.*"), None)
    header = packages / "triton/backends/nvidia/include/cuda.h"
    if torch.version.cuda is None or runtime is None or not header.exists():
        raise RuntimeError("the stand-in for a card needs a PyTorch for CUDA, with its packages nvidia and triton")
    exported = subprocess.run(["nm", "-D", runtime], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r" T (cuda\w+)", exported)) | set(re.findall(r"CUDAAPI (cu\w+)\(", header.read_text()))
    names |= {f"{name}_v2" for name in names if name.startswith("cu") and not name.startswith("cuda")}
    names -= set(re.findall(r"^(?:int|const char \*) ?\*?(cu\w+)\(", _OWN, re.MULTILINE))
    stubs = "".join(f"int {name}() {{ return {int(name in _REFUSED)}; }}\n" for name in sorted(names))
    source, library = folder / "stand_in.c", folder / "libcuda.so.1"
    source.write_text(_OWN + stubs)
    (folder / "crt").mkdir(exist_ok=True)
    (folder / "crt/host_defines.h").write_bytes((header.parent / "crt/host_defines.h").read_bytes())
    own = runtime.parents[1] / "include"
    command = ["cc", "-w", "-O1", "-shared", "-fPIC", f"-I{folder}", f"-I{own}", "-o", library, source]
    subprocess.run(command, check=True)
    return os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


_products = 0
_replaced: list[torch.library.Library] = []  # what is overridden stays so while this lives


def install() -> None:
    """In that process: products, and what checks the results of libraries, are answered at once."""
    library = torch.library.Library("aten", "IMPL")
    _replaced.append(library)

    def product(a, b, dtype=None):
        global _products
        _products += 1
        return torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=dtype or a.dtype)

    def into(*given, out, **_):
        global _products
        _products += 1
        return out

    def rows(grad, index, count, *_):
        return torch.empty(int(count), grad.shape[-1], device=grad.device, dtype=grad.dtype)

    answers = {
        "mm": product, "mm.dtype": product, "addmm": lambda c, a, b, **_: product(a, b), "mm.out": into,
        "_scaled_mm": lambda a, b, *_, out_dtype=None, **__: product(a, b, out_dtype), "_scaled_mm.out": into,
        "mm.dtype_out": into, "addmm.out": into, "addmm.dtype_out": into, "embedding_dense_backward": rows,
    }  # fmt: skip
    for name, answer in answers.items():
        library.impl(name, answer, "CUDA")


def launches() -> int:
    """Kernels asked for since the start, products among them."""
    return ctypes.c_long.in_dll(ctypes.CDLL("libcuda.so.1"), "launches").value + _products
