#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: on a CPU a Gated DeltaNet layer (Qwen3-Next, Qwen3.5, Olmo-Hybrid) reads several
# times slower when its heads forget soon, though it makes the same products of matrices.
#
# torch_chunk_gated_delta_rule multiplies by exp of sums of log-decays over a chunk. Where a head forgets a few nats a
# token, as many heads of these families do (their A begins at up to 16), most of those numbers are below 1e-38, where
# float32 has denormal numbers alone, and x86 processors take many times as long for each. Nothing says so: the outputs
# are right.
#
# Seen on a Xeon, one thread, 2 x 4096 tokens, 4 heads of 64: 0.10 s at decays of up to 0.1 nats a token, 0.56 s at up to
# 4 nats, 0.16 s at 4 nats with torch.set_flush_denormal(True), and the same outputs bit for bit. Exits with 0 while 4 nats
# take more than twice as long as the same without denormal numbers, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 transformers==5.24.0
cat > "$folder/look.py" <<'PY'
import logging, sys, time, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

torch.set_num_threads(1)
torch.manual_seed(0)
shape = (2, 4096, 4, 64)
q, k = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
v, beta, drawn = torch.randn(shape), torch.rand(shape[:3]), torch.rand(shape[:3])

def read(nats, flush):
    torch.set_flush_denormal(flush)
    best, y = float("inf"), None
    for _ in range(5):
        began = time.process_time()
        with torch.inference_mode():
            y = torch_chunk_gated_delta_rule(q, k, v, g=-nats * drawn, beta=beta)[0]
        best = min(best, time.process_time() - began)
    torch.set_flush_denormal(False)
    return best, y

soft, _ = read(0.1, False)
hard, y = read(4.0, False)
flushed, z = read(4.0, True)
print(f"decays to 0.1 nats {soft:.2f} s, to 4 nats {hard:.2f} s, without denormal numbers {flushed:.2f} s, "
      f"outputs {(y - z).abs().max().item():.0e} apart")
sys.exit(0 if hard > 2 * flushed and torch.allclose(y, z, atol=1e-5) else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
