#!/usr/bin/env bash
# transformers 5.24.0: RecurrentGemma's recurrent blocks take an attention_mask and read the padding all the same.
#
# RecurrentGemmaRecurrentBlock.forward has the argument and never looks at it: its convolution and its state read the
# tokens of padding as text (attention in the same model masks them). So a prompt padded at the left, as in any batch of
# prompts of unequal lengths, is read otherwise than alone, and otherwise again with another pad id.
#
# Seen: the logits of a prompt behind 5 tokens of masked padding are 0.16 off those of the prompt alone, and 0.31 off those
# behind padding of another id (Bamba, a hybrid that masks its recurrent layers: 8e-7 and 0.0). Exits with 0 while that is
# so, otherwise with 1.
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
from transformers import AutoModelForCausalLM, BambaConfig, RecurrentGemmaConfig

shape = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=None)
configs = {
    "RecurrentGemma": RecurrentGemmaConfig(lru_width=32, attention_window_size=64, **shape),
    "Bamba": BambaConfig(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=8,
                         attn_layer_indices=[1], **shape),
}
still = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    prompt = torch.randint(2, 97, (1, 12))
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(prompt)], 1)
    with torch.no_grad():
        alone = model(prompt, use_cache=False).logits
        zeros, threes = (
            model(torch.nn.functional.pad(prompt, (5, 0), value=pad), attention_mask=mask, use_cache=False).logits[:, 5:]
            for pad in (0, 3)
        )
    off, apart = (zeros - alone).abs().max().item(), (zeros - threes).abs().max().item()
    print(f"{name}: behind masked padding the logits are {off:.1e} from the prompt's alone, and {apart:.1e} from those "
          "behind padding of another id")
    still &= min(off, apart) > 0.05 if name == "RecurrentGemma" else max(off, apart) < 1e-4
sys.exit(0 if still else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
