#!/usr/bin/env bash
# transformers 5.24.0: xLSTM takes an attention_mask and reads the padding all the same, without a word.
#
# Its forward has no such argument: `attention_mask` vanishes in **kwargs. A tokenizer pads prompts of unequal lengths at
# the left and `generate` hands the mask on, so that in a batch every shorter prompt is answered as if its padding were
# text, while alone it is answered rightly. Mamba, which is as recurrent, masks it.
#
# Seen: the logits of a prompt behind 5 tokens of padding, masked, are those with a mask of ones bit for bit, and 4.1 off
# those of the prompt alone (Mamba: 0.0); 3 of 8 greedy tokens are others. Exits with 0 while that is so, otherwise with
# 1.
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
from transformers import AutoModelForCausalLM, MambaConfig, xLSTMConfig

shape = dict(vocab_size=97, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
configs = {
    "xLSTM": xLSTMConfig(hidden_size=64, num_heads=2, qk_dim_factor=1.0, chunk_size=16, **shape),
    "Mamba": MambaConfig(hidden_size=32, state_size=4, time_step_rank=4, **shape),
}
still = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    prompt = torch.randint(2, 97, (1, 12))
    padded = torch.nn.functional.pad(prompt, (5, 0))
    mask = (padded != 0).long()
    greedy = dict(max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        alone = model(prompt).logits
        masked, unmasked = (model(padded, attention_mask=m).logits[:, 5:] for m in (mask, torch.ones_like(mask)))
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[:, -8:]
        said_padded = model.generate(padded, attention_mask=mask, **greedy)[:, -8:]
    off, others = (masked - alone).abs().max().item(), (said != said_padded).sum().item()
    same = torch.equal(masked, unmasked)
    print(f"{name}: behind masked padding the logits are {off:.1e} from the prompt's alone, and with a mask of ones the "
          f"same bits: {same}; {others} of 8 greedy tokens are others")
    still &= off > 0.1 and same and others > 0 if name == "xLSTM" else off < 1e-5 and not same and others == 0
sys.exit(0 if still else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
