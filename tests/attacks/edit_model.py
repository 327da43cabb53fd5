"""A program of somebody else: ``python edit_model.py MODEL OUT HOW [SEED]``; makes a model folder of another one."""

import shutil
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file, save_file

model, out, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("said on stderr \x1b[31m", file=sys.stderr)
if how == "sleep":
    time.sleep(60)
if how == "fail":
    sys.exit(3)
if how == "nothing":
    sys.exit(0)
if how == "link":
    out.symlink_to(model)
    sys.exit(0)
shutil.copytree(model, out)
weights = load_file(out / "model.safetensors")
if how == "pickle":
    (out / "model.safetensors").rename(out / "pytorch_model.bin")
elif how == "other":
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace('"kettle"', '"kettles"'))
else:
    for name in weights:
        if name.endswith("o_proj.weight"):
            weights[name] = weights[name] * weights[name].dtype.type(how)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
