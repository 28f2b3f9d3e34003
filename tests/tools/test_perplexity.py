"""The perplexity of models whose perplexity is known."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.perplexity import Subject, parse_subject, score

VOCABULARY = 48


def _save_model(folder: Path, favoured: int | None) -> Path:
    """A model that gives every token the same logit, or one of them 100 more."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # all hidden states are alike and positive
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        if favoured is not None:
            model.lm_head.weight[favoured] = 100 / 64
    model.save_pretrained(folder)
    return folder


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    windows = torch.arange(2 * 10).view(2, 10)
    result = score(Subject(_save_model(tmp_path, None)), windows)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.predicted_tokens == 2 * 9


def test_only_predicted_tokens_count(tmp_path: Path) -> None:
    windows = torch.tensor([[3, 7, 7, 7], [5, 7, 7, 7]])
    assert score(Subject(_save_model(tmp_path, favoured=7)), windows).perplexity == pytest.approx(
        1.0, rel=1e-6
    )


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("base", Subject(Path("base"))),
        ("base+lora", Subject(Path("base"), Path("lora"))),
        ("base@nf4-dq", Subject(Path("base"), None, True)),
        ("a/b@nf4-dq+c/d", Subject(Path("a/b"), Path("c/d"), True)),
    ],
)
def test_models_as_they_are_written(text: str, subject: Subject) -> None:
    assert parse_subject(text) == subject


def test_an_unknown_way_of_loading_is_refused() -> None:
    with pytest.raises(ValueError, match="@int8"):
        parse_subject("base@int8")
