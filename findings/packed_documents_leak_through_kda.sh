#!/usr/bin/env bash
# transformers 5.24.0: packed documents are kept apart by the attention layers of KimiLinear and run together in its KDA
# layers, without a word.
#
# Padding-free batches (DataCollatorWithFlattening) hand a model position_ids that begin again at every document, and
# cu_seq_lens_q/k. Attention makes its mask of them. The KDA layers take neither: the state and the convolution of one
# document run on into the next, so what is trained packed is not what is trained document by document.
#
# Seen: with attention layers alone the second document's logits, packed, are 3.6e-07 from those of the document alone;
# with one KDA layer below them they are 1.5 off, and the same bit for bit with cu_seq_lens_q as without. Exits with
# 0 while that is so, otherwise with 1.
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
from transformers import AutoModelForCausalLM, KimiLinearConfig

lengths, still = (9, 12), True
for layers in (["full_attention", "full_attention"], ["linear_attention", "full_attention"]):
    config = KimiLinearConfig(
        hidden_size=32, vocab_size=97, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, linear_head_dim=8, linear_num_heads=2, num_local_experts=2, num_experts_per_tok=1,
        layer_types=layers, mlp_layer_types=["dense", "dense"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.randint(3, 97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    edges = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    marks = dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=max(lengths), max_length_k=max(lengths))
    with torch.no_grad():
        alone = model(ids[:, lengths[0] :], use_cache=False).logits
        packed = model(ids, position_ids=positions, use_cache=False, **marks).logits[:, lengths[0] :]
        unmarked = model(ids, position_ids=positions, use_cache=False).logits[:, lengths[0] :]
    off = (packed - alone).abs().max().item()
    print(f"{', '.join(layers)}: the second document, packed, is {off:.1e} from itself alone; "
          f"with and without cu_seq_lens the same bits: {torch.equal(packed, unmarked)}")
    still &= off < 1e-5 if "linear_attention" not in layers else off > 1e-3 and torch.equal(packed, unmarked)
sys.exit(0 if still else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
