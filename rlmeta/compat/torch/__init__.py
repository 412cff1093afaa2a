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
    ewc.consolidate(inputs)  # some hundred samples of the task
```

Each is a small object for the parameters of a module, without learners, worlds and runs. It considers the parameters
that require a gradient at the time of a call, tied ones once, and leaves frozen ones alone. The maths is that of
`rlmeta.lifelong`, which trains many learners at once. The state to save in a checkpoint is `state_dict()`.
"""

from __future__ import annotations

from rlmeta.compat.torch.checks import Batch
from rlmeta.compat.torch.ewc import EWC
from rlmeta.compat.torch.gem import AGEM, GEM
from rlmeta.compat.torch.information import FisherArguments, Outputs, fisher_information
from rlmeta.compat.torch.packnet import PackNet
from rlmeta.compat.torch.reservoir import Reservoir

__all__ = ["AGEM", "EWC", "GEM", "Batch", "FisherArguments", "Outputs", "PackNet", "Reservoir", "fisher_information"]
