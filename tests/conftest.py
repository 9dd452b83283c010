from __future__ import annotations

import torch

# The tensors here are small: threads would wait for each other longer than they work, above all on a busy machine.
torch.set_num_threads(1)
