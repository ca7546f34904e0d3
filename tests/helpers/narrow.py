"""What weights of a format may meet in the CPU kernels."""

import torch


def exact_weight(weight, scale=None):
    """float64, with the scales of int8's rows."""
    return weight.double() if scale is None else weight.double() * scale.double()[:, None]


def rounded(x, dtype):
    """x in float64 as narrow weights meet it: in bf16, or for int8 in whole steps of its row's largest number / 32767."""
    if dtype is torch.int8:
        step = x.abs().amax(-1, keepdim=True) / 32767
        return (x.double() * (1 / step).nan_to_num(posinf=0).double()).round() * step.double()
    return x.to(dtype).double()


def product_error(got, x, weight, scale=None):
    """The largest error over the scale of rounding, |x| |w| summed in fp32: against x as it is, or as it is rounded where
    the processor has instructions for narrow numbers."""
    weight, format = exact_weight(weight, scale), weight.dtype
    assert got.shape == (*x.shape[:-1], len(weight)) and got.dtype == torch.float32 and got.is_contiguous()
    truths = (x.double(), rounded(x, format))
    return min(
        float(((got.double() - truth @ weight.T).abs() / (truth.abs() @ weight.abs().T).clamp(min=1e-30)).max())
        for truth in truths
    )


def rounds_here(dtype):
    """Whether the CPU kernels of this machine round what weights of this format meet."""
    from mmcore.kernels.thin_linear import cpu

    x, weight, scale = torch.tensor([[1.0, 2.0**-20]]), torch.tensor([[0.0, 1.0]]), None
    if dtype is torch.bfloat16:
        x = torch.tensor([[1.0, 1 + 2.0**-20]])
    if dtype is torch.int8:
        scale = torch.ones(1)
    return cpu.why_not(x, weight.to(dtype), scale) is None and bool(cpu.thin_linear(x, weight.to(dtype), scale) != x[0, 1])


def round_in_library(monkeypatch, dtype):
    """The library's products, which a float64 model takes, meet x as weights of this format do here: so that it
    computes what the kernels compute."""
    from mmcore.kernels import linear, thin_linear

    if dtype is torch.float32 or not rounds_here(dtype):
        return
    for module in (linear.reference, thin_linear.reference):
        library = module.library_linear
        monkeypatch.setattr(module, "library_linear", lambda x, *rest, library=library: library(rounded(x, dtype), *rest))
