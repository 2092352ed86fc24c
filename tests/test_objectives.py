"Objectives are the formulas of their papers, written down a second time"
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.learner import Learner
from adverfine.networks.zoo import cnn8
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import Attack
from adverfine.attacks.gradient import FGSM, FGSMRS, NFGSM, PGD
from adverfine.attacks.apgd import APGD
from adverfine.training.objectives import Madry, MART, Objective, RSLAD, TRADES

torch.manual_seed(0)
adv,clean = 2*torch.randn(2, 5, 4, dtype=torch.float64)
y = torch.tensor([0, 1, 2, 3, 1])
base = F.cross_entropy

def _kl(p, q): return (p*(p.log()-q.log())).sum(1)

class Moody(nn.Module):
    "Other logits in training than in evaluation"
    def __init__(self): super().__init__(); self.net = nn.Linear(4, 3)
    def forward(self, x): return self.net(x.flatten(1))*(7 if self.training else 1)

def test_who_looks_at_clean_images():
    assert Objective.looks_at_clean and not Madry().looks_at_clean
    assert all(o.looks_at_clean for o in (TRADES(), MART(), RSLAD(nn.Identity())))
    with pytest.raises(NotImplementedError): Objective()(adv, clean, y, y, base)
    assert Objective().target(None, None, y) is y and Objective().check(FGSM(.1)) is None

def test_madry(): torch.testing.assert_close(Madry()(adv, None, y, y, base), base(adv, y))

@pytest.mark.parametrize('objective,beta', [(TRADES(), 6), (TRADES(.5), .5), (TRADES(0), 0)])
def test_trades(objective, beta):
    expected = base(clean, y) + beta*_kl(clean.softmax(1), adv.softmax(1)).mean()
    torch.testing.assert_close(objective(adv, clean, y, None, base), expected)

@pytest.mark.parametrize('objective,lam', [(MART(), 5), (MART(.5), .5), (MART(0), 0)])
def test_mart(objective, lam):
    p,q = clean.softmax(1),adv.softmax(1)
    total = 0
    for i,label in enumerate(y):
        rival = max(q[i,k] for k in range(4) if k!=label)
        total += -q[i,label].log() - (1-rival).log() + lam*_kl(p, q)[i]*(1-p[i,label])
    torch.testing.assert_close(objective(adv, clean, y, None, base), total/5)

@pytest.mark.parametrize('alpha', [None, 0, .25, 1])
def test_rslad(alpha):
    objective = RSLAD(nn.Identity()) if alpha is None else RSLAD(nn.Identity(), alpha)
    alpha = 5/6 if alpha is None else alpha
    t = torch.randn(5, 4, dtype=torch.float64).softmax(1)
    expected = (1-alpha)*_kl(t, clean.softmax(1)).mean() + alpha*_kl(t, adv.softmax(1)).mean()
    torch.testing.assert_close(objective(adv, clean, y, t, base), expected)

def test_weights_have_bounds():
    for make in (TRADES, MART):
        for bad in (-.1, float('nan')):
            with pytest.raises(ValueError, match='must be 0 or more'): make(bad)
    for bad in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='between 0 and 1'): RSLAD(nn.Identity(), bad)

class Wandering(Attack):
    soft = True

def test_attacks_that_an_objective_has_a_use_for():
    teacher = RSLAD(nn.Identity())
    for attack in (PGD(.1), FGSMRS(.1), NFGSM(.1), Wandering(.1)): TRADES().check(attack)
    for attack in (PGD(.1), PGD(.1, random_start=False), FGSM(.1)): teacher.check(attack)
    for attack in (FGSM(.1), PGD(.1, random_start=False), NFGSM(.1, noise=0)):
        with pytest.raises(ValueError, match='random start'): TRADES().check(attack)
    for objective in (TRADES(), teacher):
        with pytest.raises(ValueError, match='does not take'): objective.check(APGD(.1))
    for objective in (Madry(), MART()): objective.check(APGD(.1))

@pytest.mark.parametrize('which', ['TRADES', 'RSLAD'])
def test_targets_are_probabilities_in_eval_mode(which):
    net,other,x = Moody(),Moody(),torch.rand(3, 1, 2, 2)
    objective = TRADES() if which=='TRADES' else RSLAD(net)
    target = objective.target(net if which=='TRADES' else other, x, y[:3])
    torch.testing.assert_close(target, net.net(x.flatten(1)).softmax(1))
    assert not target.requires_grad and net.training and other.training

def test_a_frozen_copy_is_a_parent():
    learn = Learner(digits_dls(n_train=142), nn.DataParallel(cnn8(size=8)))
    learn.model.train()
    parent = learn.frozen_copy()
    assert type(parent) is not nn.DataParallel and not any(m.training for m in parent.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    assert learn.model.training and all(p.requires_grad for p in learn.model.parameters())
    before = [p.clone() for p in parent.parameters()]
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(1)
    assert all(torch.equal(a, b) for a,b in zip(before, parent.parameters()))

@pytest.mark.parametrize('objective', [TRADES(), MART()])
def test_gradients_are_finite_where_a_probability_is_zero(objective):
    far = torch.tensor([[200., 0, -200], [0, 300, 0]], requires_grad=True)          # as few bits make them
    objective(far+1, far, torch.tensor([0, 1]), None, base).backward()
    assert torch.isfinite(far.grad).all()
