"""What one needs every day, with fastai's vision: `from adverfine.all import *`

Everything else is reached through its module, such as `adverfine.evaluation.guards`.
No name of `fastai.vision.all` changes its meaning.
"""
from fastai.vision.all import *
from .threat import PixelModel, PixelSpace, ThreatModel, pixel_space
from .networks.zoo import cnn8, resnet18_cifar
from .networks.modes import evaluating, frozen
from .networks.cost import Cost, cost, latency, macs, storage_bytes
from .data.images import BatchDL, ImageSet, image_dls
from .data.pixels import pixels
from .data.sources import cifar10_dls, digits_dls, fashion_mnist_dls
from .data.folders import folder_dls
from .attacks.attack import Attack
from .attacks.gradient import FGSM, FGSMRS, NFGSM, PGD
from .attacks.adaptive import EOT, Transfer
from .attacks.torchattacks import TorchAttack
from .attacks.apgd import APGD
from .attacks.fab import FAB
from .attacks.fmn import FMN
from .attacks.square import Square
from .attacks.autoattack import AutoAttack
from .attacks.surrogates import Rescaled, StraightThrough
from .compression.importance import Taylor
from .compression.plan import PruningPlan
from .compression.pruning import StructuredPruning, prune
from .compression.sensitivity import robust_sensitivity
from .compression.quantization import quantize
from .compression.gradual import Quantization
from .evaluation.report import RobustnessReport
from .evaluation.robustness import evaluate
from .evaluation.metric import RobustAccuracy
from .deployment.checkpoint import compressed_info, load_compressed
from .deployment.integer import integer_network
from .deployment.onnx import OnnxNetwork, to_onnx, write_onnx
from .deployment.lowered import lower
from .deployment.hub import from_hub
from .training.acceleration import BF16, Compile
from .training.objectives import MART, RSLAD, TRADES, Madry, Objective
from .training.adversarial import AdversarialTraining
from .training.free import FreeAdversarialTraining
from .training.selection import KeepMostRobust, StopOnCatastrophe
from .training.averaging import WeightAverage
from .training.perturbation import AWP
from .training.warmup import EpsilonWarmup
from .training.recipes import compress
from .study.protocol import Cell, Compression, FineTune, Judge
from .study.study import Study
from .study.presets import recommended
from .study.tables import accuracy_table, plot_study
from .study.page import write_report
from .study.comparison import compare, write_comparison
