"""Every method Penjing knows. A method is a function; the table of its family says which, and what it needs."""

from __future__ import annotations

from penjing.methods.adaptation import table as adaptation
from penjing.methods.base import Method
from penjing.methods.binarization import table as binarization
from penjing.methods.distillation import table as distillation
from penjing.methods.low_rank import table as low_rank
from penjing.methods.pruning import table as pruning
from penjing.methods.quantization import table as quantization
from penjing.methods.weight_sharing import table as weight_sharing

FAMILIES: dict[str, tuple[Method, ...]] = {
    "quantisation": quantization.TABLE,
    "binarisation": binarization.TABLE,
    "pruning": pruning.TABLE,
    "low rank": low_rank.TABLE,
    "weight sharing": weight_sharing.TABLE,
    "distillation": distillation.TABLE,
    "adaptation": adaptation.TABLE,
}

METHODS: dict[str, Method] = {method.name: method for family in FAMILIES.values() for method in family}
