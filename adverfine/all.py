"Everything, with fastai's vision: `from adverfine.all import *`"
from fastai.vision.all import *
from .threat import *
from .data import *
from .models import *
from .cost import *
from .attacks import *
from .autoattack import *
from .pruning import *
from .quantization import *
from .adversarial import *
from .guards import *
from .evaluation import *
from .checkpoint import *
from .study import *
from .report import *
