"""How much of the logits linear_cross_entropy holds. Without torch, for plans count it too."""

def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Rows of logits held at once on a "cpu" or "cuda".

    CPU, d 512, V 8192, 4,096 rows, loss with gradients: 797 ms with 128 rows, 752 with 256, 669 with 512, 646 with
    1,024 (F.linear and F.cross_entropy 1,152). 512 rows there are 16 MiB, which still fit the third-level cache; and with
    more words, whose gradient every chunk goes through once: V 128,256 and 1,024 rows 2,555 ms with 128, 2,288 with 256,
    2,188 with 512, in bf16 1,545, 1,350, 1,221. A GPU needs thousands of rows to fill its cores, and 1 GiB of logits is
    small beside what else a step holds there.
    """
    if device_type == "cpu":  # at most 256 MiB
        return max(128, min(1024, max(2**22 // vocabulary, min(512, 2**26 // vocabulary))))
    return max(256, 2**28 // vocabulary // 256 * 256)
