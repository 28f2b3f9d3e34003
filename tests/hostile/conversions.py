"""Has transformers make its table of weight conversions: imported by a fork server, so that runs need not."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
