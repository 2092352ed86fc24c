"Callbacks with callbacks, and what people do between two fits: equal gradients, equal numbers"
from functools import partial
from itertools import combinations
import warnings
import pytest, torch, torch.nn.functional as F
from torch import nn, Tensor
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.vision.all import Callback, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, Learner, SGD, set_seed
from adverfine.networks.zoo import cnn8
from adverfine.networks.modes import bare
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.attacks.apgd import APGD
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.training.acceleration import BF16
from adverfine.training.objectives import Madry, MART, RSLAD, TRADES
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.free import FreeAdversarialTraining
from adverfine.training.averaging import WeightAverage
from adverfine.training.perturbation import AWP
from adverfine.training.warmup import EpsilonWarmup
import adverfine.compression.pruning, adverfine.compression.quantization  # noqa: F401 verbs of a Learner
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

attack,lr,gamma = PGD(.1, steps=2, random_start=False),.05,.02

class Before(Callback):
    "What each batch is before it is attacked"
    order = 15
    def before_fit(self): self.batches = []
    def before_batch(self):
        if not self.training: return
        mix = next((cb for cb in self.learn.cbs if isinstance(cb, (MixUp, CutMix))), None)
        x,y = (o[0].detach().as_subclass(Tensor).clone() for o in (self.xb, self.yb))
        mixed = (mix.yb1[0].as_subclass(Tensor), torch.as_tensor(mix.lam).clone()) if mix else (y, torch.tensor(1.))
        self.batches.append((x, y, *mixed, self.learn.pct_train))

class After(Callback):
    "And what it is afterwards"
    order = 21
    def before_fit(self): self.batches = []
    def before_batch(self):
        if self.training: self.batches.append(self.xb[0].detach().clone())

class Step(Callback):
    "The gradient that a step of the optimizer takes, and the weights it takes it at"
    order = 99
    def before_fit(self): self.steps,self.starts = [],[]
    def before_step(self):
        params = list(bare(self.model).parameters())
        self.steps.append([p.grad.clone() for p in params])
        self.starts.append(([p.detach().clone() for p in params], len(self.learn.before.batches)))

def _learner(bs=32, net=None, **kwargs):
    set_seed(0)
    dls = digits_dls(bs=bs, n_train=142)
    assert len(dls.train.dataset)==128
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=SGD)|kwargs
    return Learner(dls, (net or cnn8(size=8)), **kwargs)

def _fit(learn, epochs, *cbs):
    "Each batch before and after the attack, each step's gradient, and (weights, number of batches) when it was taken"
    before,after,step = Before(),After(),Step()
    set_seed(1)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*CUDA is not available.*')
        learn.fit(epochs, lr, cbs=[before, after, step, *cbs])
    return [(*b, a) for b,a in zip(before.batches, after.batches)],step.steps,step.starts

def _smoothed(out, y): return LabelSmoothingCrossEntropy(reduction='none')(out, y)

def _by_hand(net, batches, used):
    "The gradient of Madry's objective over `batches`, with what is in `used`"
    each = _smoothed if 'smoothing' in used else lambda out, y: F.cross_entropy(out, y, reduction='none')
    params = list(net.parameters())
    total = None
    n = sum(len(x) for x,*_ in batches)
    for x,y,y1,lam,pct,made in batches:
        share = min(1, pct/.5) if 'warmup' in used else 1
        soft = lam.view(-1, 1)*F.one_hot(y, 10) + (1-lam.view(-1, 1))*F.one_hot(y1, 10)
        step = PGD(share*.1, steps=2, random_start=False)
        adv = step(net, x, soft if 'mixup' in used or 'cutmix' in used else y)
        def loss(x=None):
            with torch.autocast('cpu', torch.bfloat16, enabled='bf16' in used):
                out = net(adv if x is None else x).float()
            return (lam*each(out, y) + (1-lam)*each(out, y1)).sum()
        # a pixel whose gradient is nearly zero may go either way, and many may in bfloat16
        if 'bf16' in used: assert loss(made) > .95*loss()
        else: assert ((made-adv).abs()>1e-5).float().mean() < .01
        adv = made
        saved = [p.detach().clone() for p in params]
        if 'awp' in used:
            uphill = torch.autograd.grad(loss(), params)
            with torch.no_grad():
                for p,g in zip(params, uphill):
                    if p.dim()>1: p += gamma*p.norm()*g/g.norm().clamp_min(1e-12)
        grads = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            for p,s in zip(params, saved): p.copy_(s)
        total = [g/n + (0 if total is None else t) for g,t in zip(grads, total or grads)]
    if 'clip' in used:
        norm = torch.stack([g.norm() for g in total]).norm()
        total = [g*min(1, .1/norm.item()) for g in total]
    return total

def _network(used):
    """A `cnn8`, with AWP a smooth one: weights are moved along a gradient there, and where rounding decides on which
    side of a ReLU's kink a unit then lies, the gradient by hand is another one"""
    set_seed(0)
    net = cnn8(size=8)
    if 'awp' in used:
        for m in list(net.modules()):
            for name,child in m.named_children():
                if isinstance(child, nn.ReLU): setattr(m, name, nn.SiLU())
    return net

parts = dict(
    accumulation=lambda: GradientAccumulation(64),
    clip=lambda: GradientClip(.1),
    mixup=MixUp,
    cutmix=CutMix,
    smoothing=None,
    fp16=MixedPrecision,
    bf16=BF16,
    awp=lambda: AWP(gamma),
    average=lambda: WeightAverage(None),
    warmup=lambda: EpsilonWarmup(.5))

def _nearly(a, b, used):
    "Equal up to rounding: that of float32, or that of bfloat16"
    a,b = (torch.cat([o.flatten() for o in g]) for g in (a, b))
    assert b.norm()>0
    if 'bf16' in used: assert F.cosine_similarity(a, b, 0)>.98 and abs(a.norm()/b.norm()-1)<.1, used
    else: assert (a-b).norm()<2e-3*b.norm(), (used, ((a-b).norm()/b.norm()).item())

@pytest.mark.parametrize('used', [(), *((o,) for o in parts), *combinations(parts, 2)], ids='+'.join)
def test_gradients_are_those_by_hand(used):
    "Every step of a fit, for all pairs of what can be combined with adversarial training"
    if set(used)=={'mixup', 'cutmix'}: pytest.skip('fastai mixes one way or the other')
    loss = LabelSmoothingCrossEntropy() if 'smoothing' in used else CrossEntropyLossFlat()
    learn = _learner(net=_network(used), loss_func=loss)
    batches,steps,starts = _fit(learn, 2, AdversarialTraining(attack), *(parts[o]() for o in used if parts[o]))
    assert len(steps)==(4 if 'accumulation' in used else 8)
    done,net = 0,_network(used)
    for grad,(weights,n) in zip(steps, starts):
        with torch.no_grad():
            for p,w in zip(net.parameters(), weights): p.copy_(w)
        _nearly(grad, _by_hand(net, batches[done:n], used), used)
        done = n

@pytest.mark.parametrize('objective', [Madry, TRADES, MART, 'rslad'])
def test_four_small_batches_are_one_big_one(objective):
    "Accumulated gradients of every objective"
    make = (lambda: RSLAD(_learner().model.eval())) if objective=='rslad' else objective
    whole = _fit(_learner(128), 1, AdversarialTraining(attack_of(objective), make()))[1]
    parts = _fit(_learner(32), 1, AdversarialTraining(attack_of(objective), make()), GradientAccumulation(128))[1]
    assert len(whole)==len(parts)==1
    _nearly(parts[0], whole[0], ())

def attack_of(objective):
    "TRADES wants a random start; one of no size makes no difference between batches"
    return Start(.1, steps=2) if objective is TRADES else attack

class Start(PGD):
    "PGD from a point that is the same for all images"
    def craft(self, model, x, y, generator):
        moved = self.threat.project(x+.03*torch.linspace(-1, 1, x[0].numel()).view_as(x[0]).sign(), x)
        return self.threat.project(PGD(.05, steps=2, random_start=False).craft(model, moved, y, generator), x)

# --- what has no meaning is refused

@pytest.mark.parametrize('cbs,why', [
    (lambda: [AdversarialTraining(APGD(.1, steps=1)), MixUp()], 'APGD-CE climbs away from one label'),
    (lambda: [AdversarialTraining(attack, MART()), CutMix()], 'MART weighs an image by the probability of its label'),
    (lambda: [FreeAdversarialTraining(.1), MixUp()], 'mixes other images in each replay')])
def test_without_a_meaning(cbs, why):
    with pytest.raises(ValueError, match=why): _fit(_learner(), 1, *cbs())

@pytest.mark.parametrize('objective', [lambda: TRADES(2), lambda: RSLAD(_learner().model.eval())])
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_images_of_other_objectives(objective, mix):
    "One step by hand: the clean loss of TRADES is that of the mixture; RSLAD asks its teacher about mixed images"
    objective,learn = objective(),_learner(128)
    batches,(grad,),((weights, _),) = _fit(learn, 1, AdversarialTraining(Start(.1, steps=2), objective), mix())
    (x,y,y1,lam,_,made),net = batches[0],cnn8(size=8)
    with torch.no_grad():
        for p,w in zip(net.parameters(), weights): p.copy_(w)
    adv,clean = net(made).chunk(2)
    kl = lambda p, out: F.kl_div(out.log_softmax(1), p, reduction='batchmean')
    each = lambda labels: F.cross_entropy(clean, labels, reduction='none')
    if isinstance(objective, TRADES):
        mixed = lam*each(y) + (1-lam)*each(y1)
        loss = mixed.mean() + 2*kl(clean.softmax(1), adv)
    else:
        p = objective.teacher(x).softmax(1).detach()
        loss = kl(p, clean)/6 + kl(p, adv)*5/6
    assert torch.equal(made[len(x):], x)
    _nearly(grad, torch.autograd.grad(loss, list(net.parameters())), ())

# --- nothing is left behind

class Trouble(Callback):
    "Fail between prediction and loss"
    order = 60
    def after_pred(self):
        if self.training: raise self.error

@pytest.mark.parametrize('permanent', [False, True])
def test_the_loss_function_comes_back(permanent):
    "After a fit, a cancelled batch and an error, also between prediction and loss"
    from fastai.callback.core import CancelBatchException
    cb,loss = AdversarialTraining(attack, Madry()),CrossEntropyLossFlat()
    learn = _learner(loss_func=loss, cbs=[cb] if permanent else [])
    for error in None, CancelBatchException(), RuntimeError('trouble'):
        trouble = Trouble()
        trouble.error = error
        cbs = [o for o in ([] if permanent else [cb]) + ([trouble] if error else [])]
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError, match='trouble'): _fit(learn, 1, *cbs)
            assert learn.loss_func.activation==loss.activation   # it steps back when it is next called
            x,y = learn.dls.valid.one_batch()
            with torch.no_grad(): wanted = loss(learn.model.eval()(x), y).item()
            with learn.no_bar(): assert learn.validate()[0]==pytest.approx(wanted, abs=1e-5)
        else: _fit(learn, 1, *cbs)
        assert learn.loss_func is loss, error

# --- what people do between two fits

def _save_and_load(learn):
    learn.save('between')
    learn.load('between')

def _freeze(learn):
    learn.freeze()
    learn.unfreeze()

def _half_precision(learn):
    learn.to_fp16()
    learn.to_fp32()

between = dict(
    nothing=lambda learn: None,
    lr_find=lambda learn: learn.lr_find(show_plot=False, num_it=8),
    save_and_load=_save_and_load,
    freeze=_freeze,
    validate=lambda learn: learn.validate(),
    get_preds=lambda learn: learn.get_preds(),
    precision=_half_precision)
compressions = dict(
    dense=lambda learn: None,
    prune=lambda learn: learn.prune(.5),
    quantize=lambda learn: learn.quantize(4),
    both=lambda learn: learn.prune(.5).quantize(4))

def _story(path, compress, *acts, opt_func=None):
    "A fit, what comes between, a compression, again what comes between, a fit: the weights, and the Learner"
    learn = _learner(path=path, metrics=RobustAccuracy(attack), **(dict(opt_func=opt_func) if opt_func else {}))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 5e-3, cbs=AdversarialTraining(attack))
        for act in acts: act(learn)
        compress(learn)
        for act in acts: act(learn)
        learn.dls.train.rng.seed(0)
        set_seed(1)
        learn.fit(1, 5e-3, cbs=AdversarialTraining(attack))
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]),learn

@pytest.mark.parametrize('compress', compressions)
def test_between_two_fits(tmp_path, compress):
    "None of it changes the training that follows; everything learns, and the Learner can be exported"
    from fastai.vision.all import Adam, load_learner
    story = partial(_story, tmp_path, compressions[compress], opt_func=Adam)
    want,_ = story()
    afresh,_ = story(lambda learn: learn.opt.clear_state())     # as fastai's freeze does
    assert not torch.equal(want, afresh)
    for name,act in between.items():
        got,learn = story(act)
        assert torch.equal(got, afresh if name=='freeze' else want), name
        assert {p for ps in learn.opt.param_lists for p in ps}==set(learn.model.parameters())
        assert all(learn.opt.state[p] for p in learn.model.parameters() if p.grad is not None)
    learn.export('learner.pkl')
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor)
    exported = load_learner(tmp_path/'learner.pkl').model
    with torch.no_grad(): assert torch.equal(exported(x), learn.model.eval()(x))
