#!/usr/bin/env bash
# lm-eval 0.4.13: RULER's question answering loses its documents once a prompt holds all of them.
#
# lm_eval.tasks.ruler.qa_utils.generate_input_output(index, num_docs, qas, docs) takes `docs` itself where num_docs is
# len(docs) or more, and shuffles that list in place. `qas` say by number which document answers them, so every later
# question, of every later length too, is asked over other documents than its own: its prompt need not hold the answer.
# With SQuAD's 1,204 paragraphs that begins at contexts of about 200K tokens, and looks like a model that fails there.
#
# Seen: 8 of 8 short prompts hold their answer before one prompt of all documents was made, and 1 of 8 after it.
# Exits with 0 while lm-eval does so, otherwise with 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 transformers==5.24.0 lm-eval==0.4.13 wonderwords==3.0.1 nltk==3.10.4
cat > "$folder/look.py" <<'PY'
import logging, random, sys
logging.disable(logging.WARNING)
from lm_eval.tasks.ruler.qa_utils import generate_input_output

docs = [f"The number of house {i} is {1000 + i}." for i in range(8)]
qas = [{"query": f"What is the number of house {i}?", "outputs": [str(1000 + i)], "context": [i],
        "more_context": [(i + 1) % 8, (i + 2) % 8]} for i in range(8)]

def answered() -> int:
    random.seed(0)
    prompts = [generate_input_output(i, 2, qas, docs) for i in range(8)]
    return sum(answers[0] in prompt for prompt, answers in prompts)

before = answered()
generate_input_output(0, 8, qas, docs)
after = answered()
print(f"prompts of two documents that hold their answer: {before} of 8, and after one prompt of all: {after} of 8")
sys.exit(0 if before == 8 and after < 8 else 1)
PY
"$folder/env/bin/python" "$folder/look.py"
