"""Lifelong methods in a plain torch loop: EWC, GEM, A-GEM, PackNet and replay for any `nn.Module` and optimizer.

```python
from rlmeta.compat import torch as plain

ewc = plain.EWC(model, strength=100.0)
for loader in tasks:
    for x, y in loader:
        loss = cross_entropy(model(x), y) + ewc.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ewc.consolidate(inputs)  # some hundreds of the task
```

Each is a small object over the parameters of one module; there is no learner, no world and no run. It looks at what
requires a gradient when it is called, takes a tied parameter once, and leaves frozen ones alone. The maths is that of
`rlmeta.lifelong`, which has many learners at once. What is to survive the process is in `state_dict()`.
"""

from __future__ import annotations

from rlmeta.compat.torch.checks import Batch
from rlmeta.compat.torch.ewc import EWC
from rlmeta.compat.torch.gem import AGEM, GEM
from rlmeta.compat.torch.information import Distribution, Outputs, fisher_information
from rlmeta.compat.torch.packnet import PackNet
from rlmeta.compat.torch.reservoir import Reservoir

__all__ = ["AGEM", "EWC", "GEM", "Batch", "Distribution", "Outputs", "PackNet", "Reservoir", "fisher_information"]
