"""Open a .gguf file with llama.cpp, and decode its tensors, by their names there, with gguf-py; see tools/read_with."""

from __future__ import annotations

from gguf import GGUFReader, dequantize
from llama_cpp import Llama

from tools.readers.answer import Question, answer, questions


def read(asked: Question) -> None:
    model = Llama(
        str(asked.model), n_ctx=max(32, len(asked.tokens)), logits_all=True, verbose=False, n_threads=1
    )
    model.eval(asked.tokens)
    logits = model.scores[: len(asked.tokens)].copy()
    tensors = GGUFReader(asked.model).tensors
    weights = {each.name: dequantize(each.data, each.tensor_type) for each in tensors}
    answer(asked, ("llama-cpp-python", "gguf"), logits, weights)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        read(each_question)
