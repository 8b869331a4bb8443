#!/usr/bin/env bash
# transformers 5.24.0: xLSTM with use_cache=False rounds its states to bfloat16 in a float32 model, without a word, as
# soon as a text is longer than config.max_inference_chunksize (16,384 tokens unless said).
#
# In evaluation mode such a text is read in chunks, whose states go through an `xLSTMCache`. With use_cache=False that
# cache is made there, without the model's type, and its default is bfloat16. Losses of long texts, which one measures
# without a cache, are so measured with states of 8 bits of precision; with use_cache=True the same text is read rightly.
#
# Seen: in a model of float32, with chunks of 32 tokens, 96 logits are those of one call (0.0 off) with use_cache=True;
# with use_cache=False the first 32 are, and the others up to 0.026 off. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch
from transformers import AutoModelForCausalLM, xLSTMConfig

torch.manual_seed(0)
config = xLSTMConfig(
    hidden_size=64, num_heads=2, qk_dim_factor=1.0, chunk_size=16, vocab_size=97, num_hidden_layers=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)
model = AutoModelForCausalLM.from_config(config).eval()
for module in model.modules():
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
ids = torch.randint(2, 97, (1, 96))
with torch.no_grad():
    whole = model(ids, use_cache=False).logits
    model.config.max_inference_chunksize = 32
    kept, dropped = ((model(ids, use_cache=use).logits - whole).abs() for use in (True, False))
first, later = slice(0, 32), slice(32, 96)
print(f"weights and logits of {model.dtype}, {whole.dtype}; off one call: use_cache=True {kept.max():.1e}, "
      f"use_cache=False {dropped[:, first].max():.1e} in the first chunk, {dropped[:, later].max():.1e} after it")
still = kept.max() < 1e-5 and dropped[:, first].max() < 1e-5 and dropped[:, later].max() > 1e-3
sys.exit(0 if still and model.dtype == torch.float32 else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
