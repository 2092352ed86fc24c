"Attacks against torchattacks on the same network; and what they must leave as it was"
import copy
from functools import partial
import pytest, torch, torchattacks
from torch import Tensor, nn
from fastai.vision.all import Learner, TensorImage, set_seed
from adverfine.threat import pixel_space
from adverfine.networks.zoo import cnn8
from adverfine.networks.modes import evaluating
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import FGSM, FGSMRS, PGD
from adverfine.attacks.adaptive import EOT
from adverfine.attacks.saturated import PGDPlusPlus
from adverfine.attacks.apgd import APGD
from adverfine.attacks.fab import FAB
from adverfine.attacks.fmn import FMN
from adverfine.attacks.square import Square
from adverfine.attacks.autoattack import AutoAttack
from adverfine.attacks.scoring import score
from adverfine.attacks.standing import Standing
from adverfine.evaluation.robustness import evaluate
from adverfine.evaluation.metric import RobustAccuracy
from adverfine.training.acceleration import BF16
from adverfine.training.adversarial import AdversarialTraining
import adverfine.compression.quantization, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(digits_dls(normalize=(.5,.5)), cnn8(size=8))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-3, cbs=AdversarialTraining(PGD(.1, steps=3)))
    return learn

@pytest.fixture(scope='module')
def model(learn): return pixel_space(learn.dls).wrap(learn.model).eval()

@pytest.fixture(scope='module')
def images(learn):
    "Plain tensors, which remember no DataLoader: networks of all kinds are asked about them"
    x,y = pixels(learn.dls.test)
    return x.as_subclass(Tensor),y

def _right(model, x, y): return (model(x).argmax(1)==y).float().mean().item()

# torchattacks divides by |grad| + 1e-10 after averaging the loss over the batch, so its l2 steps shrink to nothing
# where gradients are small or batches large; with a smaller constant it takes the steps that it means to take
peers = dict(linf=lambda m, **kw: torchattacks.PGD(m, eps=.1, alpha=.01, steps=20, **kw),
             l2=lambda m, **kw: torchattacks.PGDL2(m, eps=.8, alpha=.1, steps=20, eps_for_division=1e-30, **kw),
             fgsm=lambda m, **kw: torchattacks.FGSM(m, eps=.1))
ours = dict(linf=partial(PGD, .1, steps=20, step_size=.01),
            l2=partial(PGD, .8, steps=20, step_size=.1, norm='l2'),
            fgsm=lambda **kw: FGSM(.1))

@pytest.fixture(scope='module')
def many(learn):
    "All digits, less what the last training batch drops"
    return tuple(map(torch.cat, zip(*(pixels(dl) for dl in learn.dls))))

def _peer(model, x, y, attack):
    model = copy.deepcopy(model).eval()
    with torch.no_grad(): stands = model(x).argmax(1)==y
    return (stands & (model(attack(model)(x, y)).argmax(1)==y)).float().mean().item()

@pytest.mark.parametrize('name', peers)
def test_same_start_same_figure_as_torchattacks(model, many, name):
    theirs = _peer(model, *many, partial(peers[name], random_start=False))
    assert abs(score(model, ours[name](random_start=False), *many).robust-theirs) <= .002

@pytest.mark.parametrize('name', ['linf', 'l2'])
def test_as_strong_as_torchattacks_from_random_starts(model, many, name):
    theirs = [_peer(model, *many, peers[name]) for _ in range(3)]
    mine = [score(model, ours[name](), *many, seed=s).robust for s in range(3)]
    assert abs(sum(mine)-sum(theirs))/3 <= .01

def test_strength_does_not_depend_on_the_batch_size(model, many):
    a,b = (score(model, ours['l2'](random_start=False), *many, bs=bs).robust for bs in (32, 2000))
    assert abs(a-b) <= .002

@pytest.mark.parametrize('eps,norm', [*((eps, norm) for eps in (0, .03, 1) for norm in ('linf', 'l2', 'l1')),
                                      (30., 'l2'), (30., 'l1'), (0, 'l0'), (1, 'l0'), (9, 'l0'), (1000, 'l0')])
def test_budget(model, images, norm, eps):
    x,y = (o[:32] for o in images)
    attacks = [FGSM(eps, norm=norm), FGSMRS(eps, norm=norm), PGD(eps, steps=3, norm=norm),
               PGD(eps, steps=3, restarts=2, norm=norm), EOT(PGD(eps, steps=3, norm=norm), samples=2)]
    if norm in ('linf', 'l2'):
        attacks += [FMN(eps, steps=3, norm=norm)]
        attacks += [PGDPlusPlus(eps, steps=3, scaling=o, norm=norm) for o in ('njs', 'hns')]
    for attack in attacks:
        attack.threat.check(attack(model, x, y), x)

def test_zero_gradients_do_not_make_nan(images):
    x,y = images
    blind = lambda x: x.sum()*0 + torch.zeros(len(x), 10)
    for norm in ('linf', 'l2', 'l1', 'l0'): assert PGD(1, norm=norm)(blind, x, y).isfinite().all()
    for norm in ('linf', 'l2'):
        for attack in PGD(.1, norm=norm), PGDPlusPlus(.1, norm=norm), FMN(.1, norm=norm), EOT(PGD(.1, norm=norm), 2):
            assert attack(blind, x, y).isfinite().all()

class Fussy(nn.Module):
    "Has a frozen BatchNorm, dropout, a frozen parameter and gradients; raises on its third call"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4*36, 10))
        self.net[1].eval(); self.net[0].bias.requires_grad_(False)
        self.net(torch.rand(4, 1, 8, 8)).sum().backward()
        self.calls = 0
    def forward(self, x):
        assert not any(m.training for m in self.modules())
        self.calls += 1
        if self.calls==3: raise RuntimeError('third call')
        return self.net(x)
    def state(self):
        return ([m.training for m in self.modules()],
                [p.requires_grad for p in self.parameters()],
                [p.grad.tolist() if p.grad is not None else None for p in self.parameters()],
                [b.tolist() for b in self.buffers()])

@pytest.mark.parametrize('use', [
    lambda m,x,y: PGD(.1, steps=5)(m, x, y),
    lambda m,x,y: EOT(PGD(.1, steps=5), samples=2)(m, x, y),
    lambda m,x,y: FMN(.01, steps=5).distances(m, x, y),
    lambda m,x,y: PGDPlusPlus(.1, steps=5)(m, x, y),
    lambda m,x,y: evaluate(m, x, y, PGD(.1, steps=5))])
def test_nothing_is_left_behind(images, use):
    x = images[0][:8]
    for raises in (True, False):
        model = Fussy()
        before = model.state()
        # right about everything, so that there is something to attack
        with evaluating(model), torch.no_grad(): y = model(x).argmax(1)
        model.calls = 0
        if raises:
            with pytest.raises(RuntimeError, match='third call'): use(model, x, y)
        else:
            model.calls = 10
            use(model, x, y)
        assert model.state()==before

def test_gradients_are_on_whatever_the_caller_does(model, images):
    x,y = (o[:64] for o in images)
    pgd = PGD(.1, random_start=False)
    def seed(): return torch.Generator().manual_seed(0)
    for attack in (pgd, EOT(pgd, samples=2), FMN(.1, steps=10), PGDPlusPlus(.1), PGDPlusPlus(.1, scaling='hns')):
        with torch.no_grad(): a = attack(model, x, y, seed())
        with torch.inference_mode(): b = attack(model, x.clone(), y, seed())
        c = attack(model, x, y, seed())
        assert torch.equal(a, c) and torch.equal(b, c) and not c.requires_grad
        assert type(attack(model, TensorImage(x), y)) is Tensor

def test_own_generator_leaves_the_global_one_alone(model, images):
    x,y = (o[:8] for o in images)
    state = torch.get_rng_state()
    a,b = (PGD(.1)(model, x, y, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())

def test_bad_images_and_models(model, images):
    x,y = (o[:4] for o in images)
    for bad,why in [
            (x-1, 'in \\[0,1\\]'),
            (x*float('inf'), 'NaN or infinite'),
            (x.long(), 'float tensor'),
            (x[:0], 'no images')]:
        with pytest.raises(ValueError, match=why): PGD(.1)(model, bad, y[:len(bad)])
    with pytest.raises(ValueError, match='whole numbers'): PGD(.1)(model, x, y[:2])
    with pytest.raises(ValueError, match='-1 to'): PGD(.1)(model, x, torch.full_like(y, -1))
    with pytest.raises(ValueError, match='tuple'): PGD(.1)(lambda x: (model(x),), x, y)

def test_normalize_or_not_is_the_same_adversary(learn):
    "Normalised batches, or the normalisation inside the network: one robust accuracy, in callback and report"
    inside = Learner(digits_dls(), pixel_space(learn.dls).wrap(learn.model), metrics=RobustAccuracy(PGD(.1)))
    outside = Learner(learn.dls, learn.model, metrics=RobustAccuracy(PGD(.1)))
    assert inside.robustness(PGD(.1)).robust == outside.robustness(PGD(.1)).robust
    with inside.no_bar(), outside.no_bar(): assert inside.validate()[1] == outside.validate()[1]

def test_paper_threat_leaves_the_pixel_range(model, images):
    x,y = images
    x_adv = PGD(.05, steps=3, random_start=False, clamp=False)(model, x, y)
    assert x_adv.min()<0 and x_adv.max()>1 and (x_adv-x).abs().max()<=.05+1e-6

def test_bf16_crafts_as_well(model, images):
    a,b = (evaluate(model, *images, PGD(.1, steps=20), bf16=o).robust for o in (False, True))
    assert abs(a-b)<=.01

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_on_a_gpu():
    learn = Learner(digits_dls(normalize=(.5,.5)), cnn8(size=8), metrics=RobustAccuracy(PGD(.1, steps=3)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[AdversarialTraining(PGD(.1, steps=3)), BF16()])
        learn.quantize(4)
        learn.fit(1, 1e-3, cbs=[AdversarialTraining(PGD(.1, steps=3)), BF16()])
    half,full = (learn.robustness(PGD(.1, steps=3), bf16=o) for o in (True, False))
    assert abs(half.robust-full.robust)<=.03 and full.robust<full.clean

# ---- targets that share a batch

class Batches(nn.Module):
    "Class 0 for ever where the first pixel is bright, otherwise the class of the brightest pixel; sizes are noted"
    def __init__(self): super().__init__(); self.sizes = []
    def forward(self, x):
        self.sizes.append(len(x))
        z = x.flatten(1)
        return torch.cat([20*(z[:,:1]>.8)+z[:,:1], z[:,1:]], 1)

@pytest.mark.parametrize('attack', [APGD(.2, loss='dlr', targets=3, steps=5), FAB(.2, targets=3, steps=5)],
                         ids=lambda a: a.name)
def test_targets_share_a_batch(attack):
    x = torch.full((8, 1, 2, 2), .5)
    x[:,0,0,0] = torch.tensor([.55]*6+[1.]*2)     # six fall under the first target, two under none
    net,y = Batches(),torch.zeros(8, dtype=torch.long)
    x_adv = attack(net, x, y)
    last = len(net.sizes)-net.sizes[::-1].index(8)        # once more all are asked, then two images and two targets
    assert max(net.sizes)==8 and set(net.sizes[last:])=={4}
    assert (net(x_adv).argmax(1)!=0).tolist()==[True]*6+[False]*2

def test_rows_of_an_image_leave_together():
    x = torch.rand(4, 1, 2, 2)
    s = Standing(nn.Flatten(), x, torch.zeros(4, dtype=torch.long), image=torch.tensor([0, 1, 0, 1]))
    s.fell(0*x, torch.tensor([False, False, True, False]))
    assert s.up.tolist()==[False, True, False, True] and s.compact() and len(s.x)==2
    made = s.finish(s.x)
    assert torch.equal(made, torch.stack([x[0], x[1], 0*x[2], x[3]]))

@pytest.mark.parametrize('classes', (2, 3, 5))
def test_the_adaptive_version_attacks_networks_of_few_classes(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).eval()
    x = torch.rand(40, 1, 8, 8)
    y = model(x).argmax(1)
    def stand(attack): return (model(attack(model, x, y)).argmax(1)==y).sum().item()
    eps = .02
    assert 0<stand(AutoAttack(eps, version='adaptive'))<=stand(PGD(eps, steps=20))<40

def test_a_tie_is_no_error_that_the_search_may_leave_at():
    "Whole-number logits tie, and the first class has it: the image stands, and is searched on"
    asked = []
    def ties(x): return asked.append(len(x)) or torch.ones(len(x), 2)
    x,y = torch.full((3, 1, 4, 4), .5),torch.zeros(3, dtype=torch.long)
    Square(.1, queries=7)(ties, x, y, torch.Generator().manual_seed(0))
    assert asked.count(3)>=8

def test_a_function_that_detaches_its_input_is_told_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x,y = torch.rand(2, 1, 4, 4),torch.tensor([0, 1])
    for attack in PGD(.1),PGDPlusPlus(.1),AutoAttack(.1, version='adaptive'):
        with pytest.raises(ValueError, match='gives no gradients'): attack(lambda x: net(x.detach()), x, y)
