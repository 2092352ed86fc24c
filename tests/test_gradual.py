"Quantization during a fit: what the verb does before it, to the last bit, beside all the other callbacks"
import pytest, torch
from torch import nn
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import Callback, Learner, set_seed
from adverfine.networks.zoo import cnn8, resnet18_cifar
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.compression.pruning import StructuredPruning
from adverfine.compression.gradual import bit_stages, bits_of, Quantization
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.averaging import WeightAverage
from adverfine.training.perturbation import AWP
from adverfine.training.selection import KeepMostRobust, StopOnCatastrophe
import adverfine.compression.quantization  # noqa: F401 verb of a Learner
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

def _learner(net=None, **kw):
    set_seed(0)
    return Learner(digits_dls(bs=32, n_train=142), net or cnn8(size=8), **kw)

def _residual():
    net = resnet18_cifar(width=4)
    net.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    return net

def _fit(learn, epochs, *cbs):
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .01, cbs=cbs)
    return learn

class Notes(Callback):
    "Bits, step sizes, running means and weights at each step"
    order = 99
    def before_fit(self): self.bits,self.steps,self.means,self.weights = [],[],[],[]
    def after_step(self):
        self.bits.append(bits_of(self.model))
        self.weights.append(next(self.model.parameters()).detach().clone())
        quantizers = [m.x_quant for m in self.model.modules() if hasattr(m, 'x_quant')]
        self.steps.append([q.step.item() for q in quantizers])
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.means.append([m.running_mean.tolist() for m in norms])

beside = dict(
    alone=tuple, adversarial=lambda: (AdversarialTraining(PGD(.1, steps=2)),),
    average=lambda: (AdversarialTraining(PGD(.1, steps=1)), WeightAverage()),
    accumulation=lambda: (GradientAccumulation(64), AdversarialTraining(PGD(.1, steps=1))),
    awp=lambda: (AdversarialTraining(PGD(.1, steps=1)), AWP()),
    stop=lambda: (AdversarialTraining(PGD(.1, steps=1)), StopOnCatastrophe()))

@pytest.mark.parametrize('bits', [4, (1, 8)])
@pytest.mark.parametrize('others', beside)
def test_at_once_is_the_verb_before_a_fit(bits, others):
    with_callback = _fit(_learner(), 2, Quantization(bits), *beside[others]())
    learn = _learner()
    learn.create_opt()
    by_verb = _fit(learn.quantize(bits), 2, *beside[others]())
    assert bits_of(with_callback.model)==bits_of(by_verb.model)!=set()
    for a,b in zip(with_callback.model.parameters(), by_verb.model.parameters(), strict=True): assert torch.equal(a, b)

def test_step_sizes_are_learned():
    notes = Notes()
    learn = _fit(_learner(), 1, Quantization(4), notes)
    assert notes.steps[0]!=notes.steps[-1]
    known = {id(p) for p in learn.opt.all_params().map(lambda o: o[0])}
    assert {id(p) for p in learn.model.parameters()}<=known

@pytest.mark.parametrize('n,ran', [(1, [1]), (2, [8, 1]), (4, [8, 4, 1, 1]), (8, [8, 8, 4, 2, 1, 1, 1, 1])])
def test_stages(n, ran):
    cb,notes = Quantization(1, 'progressive'),Notes()
    assert [cb.stage_of(e, n)[0] for e in range(n)]==ran
    if n!=4: return
    _fit(_learner(), n, cb, notes, AdversarialTraining(PGD(.1, steps=1)), WeightAverage())
    per_epoch = len(notes.bits)//n
    assert [notes.bits[i*per_epoch] for i in range(n)]==[{(b, b)} for b in ran]

def test_halves():
    assert bit_stages((2, 4))==[(8, 8), (4, 4), (2, 4)] and bit_stages(8)==[(8, 8)]
    assert bit_stages((16, 1))==[(16, 8), (16, 4), (16, 2), (16, 1)]

def test_a_stage_begins_with_the_weights_that_were_trained_and_not_their_average():
    "And with the step sizes that calibration finds for them"
    class Begins(Callback):
        order = 57
        def before_train(self):
            if self.epoch!=1: return
            self.given = next(self.model.parameters()).detach().clone()
            self.step = self.model[0].w_quant.step.detach().clone()
            self.gain = self.model[0].w_quant.log_gain.detach().clone()
    begins,notes = Begins(),Notes()
    learn = _fit(_learner(), 2, Quantization(2, 'progressive'), begins, notes, WeightAverage())
    assert torch.equal(begins.given, notes.weights[len(notes.weights)//2-1])
    other = _learner()
    other.model.load_state_dict(learn.model.state_dict(), strict=False)
    other.model[0].weight.data = begins.given
    torch.testing.assert_close(other.quantize(2).model[0].w_quant.step, begins.step)
    assert begins.gain.abs().max()>0        # what was learned keeps its numbers, so that averages hold

def test_a_second_fit_goes_on():
    cb,notes = Quantization(2, 'progressive'),Notes()
    learn = _fit(_learner(), 2, cb)
    before = learn.model[0].x_quant.start.clone()
    _fit(learn, 2, cb, notes)
    assert set().union(*notes.bits)=={(2, 2)} and torch.equal(learn.model[0].x_quant.start, before)
    _fit(learn, 2, Quantization(4), notes)
    assert set().union(*notes.bits)=={(4, 4)}

def test_still():
    notes = Notes()
    _fit(_learner(_residual()), 3, Quantization(4, still=1), notes)
    third = len(notes.steps)//3
    for noted in (notes.steps, notes.means):
        assert len({str(o) for o in noted[:2*third]})==2*third and len({str(o) for o in noted[2*third-1:]})==1
    assert not torch.equal(notes.weights[-1], notes.weights[2*third])

@pytest.mark.parametrize('prune,quantize', [(dict(schedule='one_shot'), {}), (dict(end=.5), dict(start=.5)),
                                            (dict(end=.5, schedule='cubic'), dict(start=.25))])
def test_beside_pruning(prune, quantize):
    notes = Notes()
    learn = _fit(_learner(), 4, StructuredPruning(.5, **prune), Quantization(4, **quantize), notes,
                 AdversarialTraining(PGD(.1, steps=1)), WeightAverage())
    assert learn.model[0].out_channels==16 and bits_of(learn.model)=={(4, 4)}
    if quantize: assert notes.bits[0]==set()

def test_pruning_that_goes_on_too_long_is_refused():
    with pytest.raises(ValueError, match='StructuredPruning.end=1.0. still cuts in epoch 3.*quantized in epoch 0'):
        _fit(_learner(), 4, StructuredPruning(.5), Quantization(4))
    with pytest.raises(ValueError, match='end=0 must lie above 0'): StructuredPruning(.5, end=0)

@pytest.mark.parametrize('kw,why', [(dict(bits=5), 'bits=5 is not offered'), (dict(bits=4, schedule='cubic'), 'cubic'),
    (dict(bits=4, start=1), 'start=1 and end'), (dict(bits=4, still=-1), 'still=-1')])
def test_what_is_refused(kw, why):
    with pytest.raises(ValueError, match=why): Quantization(**kw)

def test_looking_for_a_learning_rate_leaves_the_network_alone():
    learn = _learner()
    learn.add_cb(Quantization(4))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=20, show_plot=False)
        learn.get_preds()
    assert bits_of(learn.model)==set()

def test_the_best_of_many_bits_is_not_restored_into_few(tmp_path):
    "More bits are more accurate: the best epoch is looked for among those that have the bits of the end"
    class Bits(Callback):
        order = 62
        def after_epoch(self): self.learn.notes.append(self.learn.keep.epoch_of_best)
    learn = _learner(metrics=RobustAccuracy(PGD(.05, steps=1), name='robust'), path=tmp_path)
    learn.notes,learn.keep = [],KeepMostRobust()
    _fit(learn, 4, Quantization(1, 'progressive'), learn.keep, Bits())
    assert learn.notes[:3]==[0, 1, 2] and learn.notes[3] in (2, 3)      # bits 8, 4, 1 and 1

def test_few_bits_after_many_work():
    x,y = pixels(_learner().dls.valid)
    for schedule in ('one_shot', 'progressive'):
        set_seed(0)
        learn = _fit(Learner(digits_dls(), cnn8(size=8)), 4)
        _fit(learn, 4, Quantization((2, 2), schedule))
        assert (learn.model.eval()(x.clone()).argmax(1)==y).float().mean()>.6

def test_the_edges_of_a_schedule():
    assert Quantization(4).end==.5 and Quantization(4, start=.75).end==.75
    for end,ran in ((0., [1, 1, 1, 1]), (1., [8, 8, 4, 1])):
        cb = Quantization(1, 'progressive', end=end)
        assert [cb.stage_of(e, 4)[0] for e in range(4)]==ran
    late = Quantization(1, start=.5)
    assert [late.stage_of(e, 4) for e in range(4)]==[None, None, (1, 1), (1, 1)]

def test_validation_leaves_batchnorm_to_fastai():
    assert not Quantization(4).run_valid

def test_what_is_there_stays_and_what_is_not_is_made():
    "A network of other bits is quantized anew from the first stage; a network of these bits stays at the last"
    cb = Quantization(2, 'progressive')
    learn = _fit(_learner(), 2, cb)
    learn.cbs,cb.learn = learn.cbs + [cb],learn
    cb.before_fit()
    assert cb.there and cb.stage==(2, 2)
    other = Quantization(1, 'progressive')
    other.learn = learn
    other.before_fit()
    assert not other.there and other.stage is None
