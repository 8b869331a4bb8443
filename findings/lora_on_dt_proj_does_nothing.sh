#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2: LoRA on dt_proj of Mamba, FalconMamba and Jamba does nothing until it is merged.
#
# Their mixers read `self.dt_proj.weight` (through peft's layer, the frozen one) and multiply with it themselves, so the
# adapter's forward, which adds B A x, never runs. A forward with the adapter on is that of the bare model, training it
# moves nothing (its gradients are None), and after `merge_and_unload()` the logits jump, since the adapter is then in.
#
# Seen: logits with a random adapter on dt_proj are 0.0 from the bare model's for all three, and after merging 0.003 to 5
# from it. Exits with 0 while that is so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconMambaConfig, JambaConfig, MambaConfig

shape = dict(hidden_size=32, vocab_size=97, num_hidden_layers=2, pad_token_id=0)
configs = {
    "Mamba": MambaConfig(**shape, state_size=4, time_step_rank=4),
    "FalconMamba": FalconMambaConfig(**shape, state_size=4, time_step_rank=4),
    "Jamba": JambaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_experts=1,
                         attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4),
}
still = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(2, 97, (1, 24))
    with torch.no_grad():
        bare = model(ids, use_cache=False).logits
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["dt_proj"])).eval()
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.normal_(std=3.0)
        on = (adapted(input_ids=ids, use_cache=False).logits - bare).abs().max().item()
        merged = (adapted.merge_and_unload()(ids, use_cache=False).logits - bare).abs().max().item()
    print(f"{name}: adapter on {on:.1e}, merged {merged:.1e} from the bare model's logits")
    still &= on == 0 < merged
sys.exit(0 if still else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
