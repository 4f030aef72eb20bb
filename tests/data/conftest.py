import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from sae_zoo.lm.load import load_lm
from sae_zoo.lm.pretraining import train_tokenizer


@pytest.fixture(scope="session")
def tiny_gemma2():
    """Makes, in ``folder``, a Gemma 2 with the module tree of the 9B model, its heads together wider than the stream,
    and a tokenizer of the files in ``text``; returns the loaded model.
    """

    def make(text, folder):
        tokenizer = train_tokenizer((f.read_text() for f in sorted(text.iterdir())), 300, 16)
        torch.manual_seed(0)
        Gemma2ForCausalLM(Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=16)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_lm(str(folder))

    return make
