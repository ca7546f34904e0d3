"""A kernel launched again and again, run as a program without a card: `python -m tests.helpers.relaunch`.

Whether a launch that Tuned remembers is what Triton itself would have launched: the same compiled kernel, grid and arguments.
"""

import itertools
import os

os.environ.pop("MM_AUTOTUNE", None)  # 0 where tests run beside each other on a card, and choosing is what is tested

import torch
import triton
import triton.language as tl

from mmcore.kernels import tuning
from tests.helpers import no_card


@triton.jit(do_not_specialize=("moving",))
def _scale(x, out, count, step, moving, eps, LENGTH, N: tl.constexpr, TWICE: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at * step, mask=at < count).to(tl.float32) + moving + eps + LENGTH
    tl.store(out + at, value * 2 if TWICE else value, mask=at < count)


launched: list[tuple] = []
no_card.NoCard.launcher_cls.__call__ = lambda self, *given: launched.append(given)
no_card.NoCard.utils.load_binary = lambda *_: (object(), object(), 32, 0, 1024)  # a function for each compiled kernel


def times(self):
    """The larger block is the faster one from a LENGTH of 100 on."""

    def measure(call, quantiles=None, **_):
        launched.clear()
        call()
        length, block = launched[-1][9:][6:8]
        return [1.0 if (block == 64) == (length >= 100) else 2.0] * 3

    return measure


no_card.NoCard.get_benchmarker = times


def seen(call) -> tuple:
    """What reaches the launcher: grid, stream, the compiled kernel's function and arguments. Tensors by address."""
    launched.clear()
    call()
    given = launched[-1]  # before it a tuner tries its configurations
    return given[:6], *(n.data_ptr() if isinstance(n, torch.Tensor) else n for n in given[9:])


def main() -> None:
    single = tuning.Tuned(_scale, [triton.Config({"N": 32}, num_warps=1)], ())
    several = tuning.Tuned(_scale, [triton.Config({"N": n}, num_warps=1) for n in (64, 32)], ("LENGTH", "TWICE"))
    chosen = (lambda length: single.configs[0], lambda length: several.configs[length < 100])
    wide = torch.zeros(64)
    tensors = (wide, wide[1:], wide.half(), torch.nn.Parameter(wide))
    cases = list(itertools.product(tensors, (1, 16, 17, 2**40), (3,), (0, 5, 2**35), (64, 128), (True, False)))
    compiled = set()
    for tuned, choice in zip((single, several), chosen, strict=True):
        for twice in range(2):  # the first round may compile, the second only remembers
            for x, count, step, moving, length, constant in cases:
                def grid(meta):
                    return (triton.cdiv(17, meta["N"]),)

                given = (x, wide, count, step, moving, 1e-5, length)
                known = len(tuned._known)
                ours = seen(lambda: tuned(grid, *given, on=x, TWICE=constant))
                assert not twice or len(tuned._known) == known, "a case was not remembered"
                own = seen(lambda: _scale[grid](*given, TWICE=constant, **choice(length).all_kwargs()))
                assert ours == own, (given[2:], ours, own)
                compiled.add(own[0][4])
    torch.use_deterministic_algorithms(True)
    for length in (64, 128):
        given = (wide, wide, 17, 3, 0, 1e-5, length)
        ours = seen(lambda: several((1,), *given, on=wide, TWICE=True))
        assert ours[1:] == (*(wide.data_ptr(),) * 2, *given[2:], 64, True), "not the first configuration"
    torch.use_deterministic_algorithms(False)
    known = len(single._known)
    for count in range(18, 1000):
        single((1,), wide, wide, count, 3, count, 0.0, 8, on=wide, TWICE=True)
    assert len(single._known) <= known + 4, "lengths make the table grow"
    print(f"{len(cases)} cases, {len(single._known)} and {len(several._known)} remembered, {len(compiled)} kernels")


if __name__ == "__main__":
    main()
