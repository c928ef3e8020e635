"""The commands of the command line: one dataclass each, whose fields are its options and whose ``run`` calls
the rooms."""

from __future__ import annotations

from ambient_sci.commands.data import Import, Inspect, Simulate
from ambient_sci.commands.distill import Distill
from ambient_sci.commands.importing import ImportPrior
from ambient_sci.commands.info import Info
from ambient_sci.commands.memorization import (
    MemorizationAttackCommand,
    MemorizationErrorCommand,
    MemorizationScoreCommand,
)
from ambient_sci.commands.model import Generate, Reconstruct
from ambient_sci.commands.protocol import EvaluatePrior
from ambient_sci.commands.results import Evaluate, Export, Quickstart
from ambient_sci.commands.train import Train

#: By name; a name of two words is a command of a group.
COMMANDS = {
    "simulate": Simulate,
    "import": Import,
    "inspect": Inspect,
    "import-prior": ImportPrior,
    "train": Train,
    "distill": Distill,
    "generate": Generate,
    "reconstruct": Reconstruct,
    "evaluate": Evaluate,
    "evaluate-prior": EvaluatePrior,
    "memorization score": MemorizationScoreCommand,
    "memorization attack": MemorizationAttackCommand,
    "memorization error": MemorizationErrorCommand,
    "export": Export,
    "quickstart": Quickstart,
    "info": Info,
}
