"""New knowledge: the question-answering and needle tasks of RULER (Hsieh et al., 2024, arXiv 2404.06654).

A long text with facts in it, a question last. The construction follows NVIDIA/RULER at commit c3f5e3b4f87f, with two
of its flaws mended unless exact compatibility is asked for (qa.py says which).
"""

ANSWER_TOKENS = {"qa": 32, "niah": 128}
"""Tokens that a model may write for an answer; the length of a prompt is a budget that includes them."""

QA_TASKS = ("qa_1", "qa_2")

NIAH_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery",
)

TASKS = QA_TASKS + NIAH_TASKS
