#!/usr/bin/env python3
"""Does train_gpt with dev/learn/variants/llama.diff compute what Hugging Face's Llama computes?

    python3 dev/check/check_llama.py

Needs torch and transformers (dev/requirements.txt), and gcc; says so and ends if they are not there. A random
LlamaForCausalLM's weights are written under train_gpt's names, and the logits of all positions compared: for a whole
context longer than a tile of attention, with as many heads of keys as of queries, with fewer, and with one. In float32
they must agree within 1e-4 of the largest logit.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as missing:
    print(f"skipped: Llama's logits; {missing.name} is not installed")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit()

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FLAGS = "-std=c11 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp".split()
LIMIT = 1e-4
V, T, C, H, L = 300, 70, 48, 6, 3


def llama(key_heads):
    """Weights ten times as large as a new model's, so that logits and attention are far from uniform."""
    torch.manual_seed(key_heads)
    config = transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=T, hidden_size=C, num_attention_heads=H, num_key_value_heads=key_heads,
        num_hidden_layers=L, intermediate_size=8 * C // 3, rms_norm_eps=1e-5, initializer_range=0.2,
        tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "norm" in name:
                w.copy_(1 + 0.3 * torch.randn_like(w))
    return model


def save(model, key_heads, path):
    """Theirs are (out, in), ours (in, out); their W^Q, W^K and W^V are three, as are the MLP's gate and up."""
    w = model.state_dict()
    side_by_side = lambda *names: torch.cat([w[name + ".weight"].T for name in names], 1).contiguous()
    ours = {"wte.weight": w["model.embed_tokens.weight"], "lm_head.weight": w["lm_head.weight"],
            "ln_f.weight": w["model.norm.weight"]}
    for l in range(L):
        theirs, attention, mlp = f"model.layers.{l}.", f"model.layers.{l}.self_attn.", f"model.layers.{l}.mlp."
        ours[f"h.{l}.ln_1.weight"] = w[theirs + "input_layernorm.weight"]
        ours[f"h.{l}.ln_2.weight"] = w[theirs + "post_attention_layernorm.weight"]
        ours[f"h.{l}.attn.c_attn.weight"] = side_by_side(*(attention + x for x in ["q_proj", "k_proj", "v_proj"]))
        ours[f"h.{l}.attn.c_proj.weight"] = side_by_side(attention + "o_proj")
        ours[f"h.{l}.mlp.c_fc.weight"] = side_by_side(mlp + "gate_proj", mlp + "up_proj")
        ours[f"h.{l}.mlp.c_proj.weight"] = side_by_side(mlp + "down_proj")
    options = {"--context": T, "--heads": H, "--kv-heads": key_heads, "--rotary": 1, "--rmsnorm": 1, "--activation": 2,
               "--no-biases": 1, "--untied": 1}
    save_file(ours, path, {name: str(value) for name, value in options.items()})


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main():
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        program, weights = os.path.join(folder, "logits"), os.path.join(folder, "llama.safetensors")
        changed = run(sys.executable, os.path.join(ROOT, "dev/learn/variants/run.py"), "--only-apply", "llama").strip()
        os.makedirs(os.path.join(folder, "dev/check"))
        shutil.copy(os.path.join(changed, "train_gpt.c"), folder)
        source = shutil.copy(os.path.join(HERE, "logits.c"), os.path.join(folder, "dev/check"))
        run("gcc", *FLAGS, source, "-o", program, "-lm")
        for key_heads in [H, 2, 1]:
            model = llama(key_heads)
            save(model, key_heads, weights)
            tokens = random.Random(key_heads).choices(range(V), k=T)
            text = run(program, weights, input=" ".join(map(str, tokens)))
            ours = torch.tensor([[float(x) for x in line.split()] for line in text.splitlines()])
            with torch.no_grad():
                theirs = model(torch.tensor([tokens])).logits[0]
            difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
            print(f"{key_heads} heads of keys for {H} of queries: largest difference {difference:.1e}, logit {size:.1f}")
            failed += not difference <= LIMIT * size
    print(f"{3 - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
