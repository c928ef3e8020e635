"""One thread for each test process: two of them with torch's default threads take ten times as long on two cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
