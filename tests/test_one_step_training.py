"NuAT and FGSM-PGI by hand in float64, and within fits"
import math
import numpy as np
import pytest, torch, torch.nn.functional as F
from torch import nn, Tensor
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, SGD, set_seed
from adverfine.networks.zoo import cnn8
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import PGD
from adverfine.training.adversarial import AdversarialTraining
from adverfine.training.nuclear import NuAT, nuclear_norm, NuclearFGSM
from adverfine.training.prior import PriorGuidedTraining
from adverfine.training.warmup import EpsilonWarmup
import adverfine.evaluation.robustness, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

torch.manual_seed(0)
w = torch.randn(16, 5, dtype=torch.float64)
x,y = torch.rand(6, 1, 4, 4, dtype=torch.float64)*.6+.2,torch.tensor([0, 1, 2, 3, 4, 0])
def net(x): return x.flatten(1)@w

def test_the_norm_is_the_sum_of_singular_values():
    a,b = torch.randn(7, 4, dtype=torch.float64),torch.randn(7, 4, dtype=torch.float64)
    assert nuclear_norm(a, b).item()==pytest.approx(np.linalg.svd((a-b).numpy())[1].sum()/7, rel=1e-12)
    assert nuclear_norm(a.bfloat16(), a.bfloat16())==0

@pytest.mark.parametrize('lam', [0, .5, 4])
def test_nuclear_step(lam):
    attack = NuclearFGSM(.1, lam=lam)
    made = attack(net, x, y, torch.Generator().manual_seed(3))
    noise = np.sign(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)).numpy()-.5)*.05
    start = x.numpy()+noise
    z = start.reshape(6, -1)@w.numpy()
    p = np.exp(z-z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    u,_,v = np.linalg.svd(noise.reshape(6, -1)@w.numpy(), full_matrices=False)
    grad = (p-np.eye(5)[y] + lam*(u@v))@w.numpy().T          # of the norm by the logits: U V^T
    expected = np.clip(start+.1*np.sign(grad).reshape(x.shape), x.numpy()-.1, x.numpy()+.1)
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert attack.passes==3 and attack.name=='NuFGSM'

def test_what_a_nuclear_step_is():
    "It starts at random, and its loss takes labels of more than one class"
    attack = NuclearFGSM(.1)
    assert attack.soft and attack.random_start and attack.norms==('linf',)
    soft = F.one_hot(y, 5)*.8+.04
    made = [attack(net, x, o, torch.Generator().manual_seed(3)) for o in (y, soft, F.one_hot(y, 5).double())]
    assert torch.equal(made[0], made[2]) and (made[1]-x).abs().max()<=.1+1e-6

def test_nuclear_objective():
    adv,clean = torch.randn(6, 5, dtype=torch.float64),torch.randn(6, 5, dtype=torch.float64)
    norm = np.linalg.svd((adv-clean).numpy())[1].sum()/6
    for lam in (0, 2.5):
        made = NuAT(lam)(adv, clean, y, y, F.cross_entropy)
        assert made.item()==pytest.approx(F.cross_entropy(clean, y).item()+lam*norm, rel=1e-12)
    assert NuAT().lam==4 and NuclearFGSM(.1).lam==4

@pytest.mark.parametrize('make', [lambda: NuAT(-1), lambda: NuclearFGSM(.1, lam=-1), lambda: NuAT(math.nan),
                                  lambda: PriorGuidedTraining(.1, lam=-1), lambda: NuclearFGSM(.1, norm='l2')])
def test_what_is_refused(make):
    with pytest.raises(ValueError, match='lam=.*0 or more|l2'): make()

class Seen(Callback):
    "What the network is given, and the gradient of each step"
    order = 30
    def before_fit(self): self.given,self.grads,self.weights,self.clean = [],[],[],[]
    def before_batch(self):
        if not self.training: return
        self.given.append(self.xb[0].detach().as_subclass(Tensor).clone())
        self.weights.append([p.detach().clone() for p in self.model.parameters()])
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])

class Clean(Callback):
    order = 10
    def before_batch(self):
        if not self.training: return
        self.learn.notes.clean.append(tuple(o[0].as_subclass(Tensor).clone() for o in (self.xb, self.yb)))

def _fit(*cbs, epochs=2, **kw):
    set_seed(0)
    learn = Learner(digits_dls(bs=32, n_train=130, **kw), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), opt_func=SGD,
                    loss_func=CrossEntropyLossFlat())
    learn.notes = Seen()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .05, cbs=[learn.notes, Clean(), *cbs])
    return learn

@pytest.mark.parametrize('normalize', [None, (.4, .5)])
def test_each_step_starts_where_the_batch_before_ended(normalize):
    learn = _fit(PriorGuidedTraining(.1, lam=3.), normalize=normalize)
    mean,std = normalize or (0, 1)
    seen,delta = learn.notes,None
    per_epoch = len(seen.given)//2
    assert per_epoch==3
    for k,(given,(clean,y),(weight,bias)) in enumerate(zip(seen.given, seen.clean, seen.weights)):
        if k%per_epoch==0: delta = None
        pixels = clean*std+mean
        start = pixels if delta is None else torch.clamp(pixels+delta, 0, 1)
        z = ((start-mean)/std).flatten(1)@weight.T+bias
        grad = (z.softmax(1)-F.one_hot(y, 10))@weight
        stepped = torch.clamp(start+.1*grad.view_as(start).sign(), 0, 1)
        x_adv = torch.minimum(torch.maximum(stepped, pixels-.1), pixels+.1)
        attacked,begun = given.chunk(2)
        torch.testing.assert_close(attacked, (x_adv-mean)/std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(begun, (start-mean)/std, rtol=1e-4, atol=1e-5)
        delta = x_adv-pixels
        weight,bias = weight.clone().requires_grad_(),bias.clone().requires_grad_()
        adv,before = (o.flatten(1)@weight.T+bias for o in (attacked, begun))
        loss = F.cross_entropy(adv, y) + 3*(adv-before).square().mean()
        for a,b in zip(torch.autograd.grad(loss, (weight, bias)), seen.grads[k]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

def test_the_last_batch_of_another_size_has_no_memory():
    cb = PriorGuidedTraining(.1)
    learn = Learner(digits_dls(bs=32, n_train=130), cnn8(size=8))
    learn.dls.train.drop_last = False
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cb)
    assert len(cb.delta)<32 and cb.delta.abs().max()<=.1+1e-6

def test_a_warm_up_shrinks_the_step_and_the_memory():
    sizes = []
    class Sizes(Callback):
        order = 30
        def before_batch(self):
            if self.training: sizes.append(self.learn.prior.delta.abs().max().item())
    learn = Learner(digits_dls(bs=32, n_train=130), cnn8(size=8))
    learn.prior = PriorGuidedTraining(.2)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=[learn.prior, EpsilonWarmup(.5), Sizes()])
    assert sizes[0]<.05 and sizes[-1]==pytest.approx(.2, abs=1e-5) and sizes==sorted(sizes)

@pytest.mark.parametrize('make', [lambda: AdversarialTraining(NuclearFGSM(.1), NuAT()),
                                  lambda: PriorGuidedTraining(.1, lam=1.)])
def test_both_make_networks_robust(make):
    set_seed(0)
    learn = Learner(digits_dls(), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3)
    before = learn.robustness(PGD(.1), progress=False).robust
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 2e-3, cbs=make())
    assert learn.robustness(PGD(.1), progress=False).robust>before+.1
