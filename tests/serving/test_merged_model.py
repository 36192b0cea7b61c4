"""A merged model in a plain vLLM, which knows nothing of adapters.

TFSLURM_TEST_SERVE_PYTHON  the Python of an environment with vLLM
TFSLURM_TEST_MODEL         a base model's folder
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("TFSLURM_TEST_SERVE_PYTHON", "")
MODEL = os.environ.get("TFSLURM_TEST_MODEL", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (PYTHON and MODEL),
        reason="NOT TESTED: a merged model in a real vLLM. TFSLURM_TEST_SERVE_PYTHON and TFSLURM_TEST_MODEL are unset.",
    ),
]

NOISE = 0.1
"""Nats: twice and more what computing in bfloat16 makes, 0.035."""

PROBE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, ids, answer = sys.argv[1:]
    model = LLM(folder, max_model_len=256, enforce_eager=True)
    ids = json.loads(ids)
    said = model.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    with open(answer, "w") as file:
        json.dump([found[id].logprob for id, found in zip(ids[1:], said.prompt_logprobs[1:])], file)
"""


def test_vllm_gives_the_words_the_probabilities_of_base_and_adapter_together(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="NOT TESTED: merging needs torch beside vLLM's own environment")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from tfslurm.training.export import Question
    from tfslurm.training.merging import _probe, log_probabilities, merge

    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, lora).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "merged").mkdir()
    folders = {"base": MODEL, "adapter": str(tmp_path / "adapter"), "destination": str(tmp_path / "merged")}
    agreement = merge(Question(**folders))
    assert agreement.distance < agreement.tolerance < 2 * NOISE < agreement.effect

    ids = _probe(Path(MODEL))
    (tmp_path / "probe.py").write_text(PROBE)
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, tmp_path / "probe.py", tmp_path / "merged", json.dumps(ids[0].tolist()), tmp_path / "answer.json"],
        env=os.environ | cpu, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.tensor(json.loads((tmp_path / "answer.json").read_bytes()))
    assert (theirs - log_probabilities(adapted.float(), ids)).abs().mean() < NOISE
