"The plan on groups that are only numbers, and cuts in networks whose answer is known"
import copy
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, Learner, SGD
from adverfine.threat import pixel_space
from adverfine.networks.zoo import cnn8
from adverfine.networks.modes import evaluating
from adverfine.networks.attention import opened
from adverfine.networks.cost import macs
from adverfine.data.pixels import example_images, training_batches
from adverfine.data.sources import digits_dls
from adverfine.attacks.gradient import FGSM
from adverfine.compression.channels import _tied_to, channel_groups, Group, Heads, traceable
from adverfine.compression.importance import channel_scores, criteria, importance_by, Taylor
from adverfine.compression.plan import check_pruned_share, PruningPlan, whole_channels
from adverfine.compression.pruning import prune, schedules, StructuredPruning
import fastai.callback.progress  # noqa: F401 verbs of a Learner

def _groups(*sizes, copies=1):
    return [Group(None, f'l{i}', [f'l{i}', f'l{i}.also'], n, copies) for i,n in enumerate(sizes)]
def _heads(n, name='attention'): return Heads(None, name, [name], n, 1)

# --- the plan

def test_shares():
    for bad in (0, 1, -.1, 1.1, True, False, float('nan')):
        with pytest.raises(ValueError, match='both excluded'): check_pruned_share(bad)
    for good in (.001, .5, .999): check_pruned_share(good)

def test_plans_are_checked():
    for kw in (dict(share=.5), dict(keep_macs=.5), dict(share={'a': .5}),
               dict(share=.5, scope='global', floor=0), dict(share=.5, floor=.99, round_to=8)):
        PruningPlan(**kw)
    for kw,why in [(dict(), 'give one of them'), (dict(share=.5, keep_macs=.5), 'give one of them'),
                   (dict(share=0.), 'share=0.0'), (dict(share={'a': .5, 'b': 1.}), 'share=1.0'),
                   (dict(keep_macs=0), 'keep_macs=0'),
                   (dict(keep_macs=1), 'keep_macs=1'), (dict(keep_macs=-.5), 'keep_macs=-0.5'),
                   (dict(share=.5, criterion='l3'), 'is unknown'), (dict(share=.5, scope='local'), 'is unknown'),
                   (dict(share={'a': .5}, scope='global'), 'nothing to choose globally'),
                   (dict(share=.5, floor=1), 'floor=1'), (dict(share=.5, floor=-.1), 'floor=-0.1'),
                   (dict(share=.5, round_to=0), 'round_to=0'), (dict(share=.5, round_to=True), 'round_to=True'),
                   (dict(share=.5, round_to=2.), 'round_to=2.0')]:
        with pytest.raises(ValueError, match=why): PruningPlan(**kw)
    plan = PruningPlan(.5)
    assert (plan.keep_macs, plan.criterion, plan.scope, plan.floor, plan.round_to)==(None, 'l1', 'uniform', .1, 1)
    assert PruningPlan(.5, criterion='taylor').criterion==Taylor()
    assert PruningPlan(.5, criterion=Taylor(n_batches=2)).criterion.n_batches==2 and Taylor().n_batches==4
    assert Taylor().attack is None
    for o in criteria: assert PruningPlan(.5, criterion=o).criterion==o

def test_uniform_plans():
    groups = _groups(10, 7, 100)
    # 7.000000001 is 7
    assert PruningPlan(.5).kept(groups, None)==[5, 3, 50] and PruningPlan(.5).kept(groups, None, .5)==[7, 5, 75]
    assert PruningPlan(.3).kept(_groups(10), None)==[7]
    assert PruningPlan(.85).kept(groups, None)==[1, 1, 15]
    with pytest.raises(ValueError, match="none of the 7 channels of layer 'l1': use at most 0.857"):
        PruningPlan(.9).kept(groups, None)
    with pytest.raises(ValueError, match="none of the 14 channels of layer 'l1': use at most 0.857"):
        PruningPlan(.95).kept(_groups(10, 7, copies=2), None)
    assert PruningPlan(.9).kept(_groups(10), None)==[1]
    # one head stays
    assert PruningPlan(.9).kept([_heads(4)], None)==[1] and PruningPlan(.5).kept([_heads(4)], None)==[2]

def test_plans_of_single_layers():
    groups = [*_groups(10, 10, 10), _heads(8)]
    assert PruningPlan({'l0': .5}).kept(groups, None)==[5, 10, 10, 8]
    # the largest counts
    assert PruningPlan({'l?': .5, 'l1': .8, 'l2': .2}).kept(groups, None)==[5, 2, 5, 8]
    assert PruningPlan({'*.also': .4, 'att*': .75}).kept(groups, None)==[6, 6, 6, 2]
    assert PruningPlan({'l0': .5, 'l1': .1}).kept(groups, None, .5)==[7, 9, 10, 8]
    with pytest.raises(ValueError, match="is called 'x': there are l0, l0.also, l1"):
        PruningPlan({'l0': .5, 'x': .5}).kept(groups, None)

def test_multiples():
    for n,share,unit,copies,kept in [(64, .5, 8, 1, 32), (64, .45, 8, 1, 32), (64, .4, 8, 1, 40), (64, .97, 8, 1, 8),
            (10, .1, 8, 1, 8), (6, .1, 8, 1, 6), (20, .05, 8, 1, 16), (22, .05, 8, 1, 22),
                                     (16, .45, 8, 4, 8), (15, .45, 8, 4, 8), (15, .33, 6, 4, 9), (10, .45, 1, 1, 5)]:
        groups = _groups(n, copies=copies)
        assert PruningPlan(share, round_to=unit).kept(groups, None)==[kept], (n, share, unit, copies)
    # heads are no channels
    assert PruningPlan(.4, round_to=8).kept([_heads(8)], None)==[4]

def test_global_plans_take_the_least_important_of_all():
    groups,scores = _groups(4, 6),[torch.tensor([9., 1, 8, 2]), torch.tensor([5., 3, 4, 7, 6, 10])]
    assert PruningPlan(.4, scope='global').kept(groups, scores)==[2, 4]
    assert PruningPlan(.4, scope='global').kept(groups, scores, .5)==[2, 6]
    assert PruningPlan(.1, scope='global').kept(groups, scores)==[3, 6]
    assert PruningPlan(.1, scope='global').kept(groups, scores, 0.)==[4, 6]
    assert PruningPlan(.7, scope='global', floor=0.).kept(groups, scores)==[2, 1]
    low = [torch.tensor([.1, .2, .3, .4]), torch.arange(1., 7)]
    # 1.2 is 2 channels
    assert PruningPlan(.5, scope='global', floor=.5).kept(groups, low)==[2, 3]
    assert PruningPlan(.5, scope='global', floor=.3).kept(groups, low)==[2, 3]
    assert PruningPlan(.5, scope='global', floor=0).kept(groups, low)==[1, 4]
    with pytest.raises(ValueError, match='floor=0.5 leaves to cut: use at most 0.5'):
        PruningPlan(.6, scope='global', floor=.5).kept(groups, low)
    with pytest.raises(ValueError, match='floor=0 leaves to cut: use at most 0.8'):
        PruningPlan(.9, scope='global', floor=0).kept(groups, low)
    equal = [torch.ones(4), torch.ones(6)]
    # of equals the first
    assert PruningPlan(.3, scope='global').kept(groups, equal)==[1, 6]
    assert PruningPlan(.4, scope='global', round_to=4).kept(groups, scores)==[4, 4]

def test_global_plans_count_what_is_gone_already():
    "The groups say how many there were, the scores what is left"
    groups,scores = _groups(4, 6),[torch.tensor([9., 8]), torch.tensor([5., 4, 7, 6, 10])]
    plan = PruningPlan(.5, scope='global')
    assert plan.kept(groups, scores)==[2, 3] and plan.kept(groups, scores, .4)==[2, 5]
    assert plan.kept(groups, scores, .2)==[2, 5]

# --- channels

def _chain():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6*36, 10))
x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

def _found(net, x=x):
    with opened(net, x), traceable(net): return channel_groups(net, x)[1]

class Late(nn.Module):
    "Layers that run in another order than they are written in, one of them never; a sum; grouped and depthwise ones"
    def __init__(self):
        super().__init__()
        self.head,self.idle,self.c = nn.Linear(8, 10),nn.Conv2d(1, 2, 1),nn.Conv2d(8, 8, 1, groups=2)
        self.b,self.a = nn.Conv2d(8, 8, 3, padding=1, groups=8),nn.Conv2d(1, 8, 3, padding=1)
        self.d,self.e = nn.Conv2d(8, 12, 1),nn.Conv2d(12, 8, 1)
    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        return self.head((h+self.e(self.d(h))).mean((2,3)))

def test_groups():
    assert [(g.name, g.layers, g.n, g.copies, g.path) for g in _found(_chain())]==[('0', ['0'], 8, 1, '0'),
        ('3', ['3'], 6, 1, '3')]
    found = _found(Late())
    assert [(g.name, g.layers, g.n, g.copies) for g in found]==[('a', ['a', 'b'], 4, 2), ('c', ['c', 'e'], 4, 2),
        ('d', ['d'], 12, 1)]
    assert not any(isinstance(g, Heads) for g in found)
    assert found[0].least==0 and Heads.least==1

def test_grouped_convolutions_lose_the_same_channels_in_each_group():
    torch.manual_seed(0)
    net = Late()
    [first] = [g for g in _found(net) if g.name=='a']
    assert first.cut([1, 3], 4)==(first.path, True, [1, 3, 5, 7])
    before = copy.deepcopy(net)
    prune(net, {'a': .5}, x)
    assert net.a.out_channels==net.b.out_channels==net.b.groups==4 and net.c.in_channels==4 and net.c.groups==2
    assert net.d.out_channels==12
    kept = [next(i for i in range(8) if torch.equal(before.a.weight[i], w)) for w in net.a.weight]
    assert len({k for k in kept if k<4})==2 and {k+4 for k in kept if k<4}=={k for k in kept if k>3}

def test_what_cannot_be_pruned():
    shared = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    shared[2].weight = shared[1].weight
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 1)), nn.Flatten(),
        nn.Linear(256, 2))
    class Extra(nn.Conv2d):
        def __init__(self, *args): super().__init__(*args); self.gain = nn.Parameter(torch.ones(1))
    for net,why in [(shared, "'1' and '2' share a parameter"), (parametrized, 'more than a weight and a bias'),
            (nn.Sequential(Extra(1, 4, 1), nn.Flatten(), nn.Linear(256, 2)),
            "'0' \\(Extra\\) has more than a weight and a bias \\(gain\\)"),
                    (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), '1 of them ran'), (nn.Flatten(), '0 of them ran')]:
        flags = [m.training for m in net.modules()]
        with pytest.raises(ValueError, match=why): _found(net)
        assert flags==[m.training for m in net.modules()] and not any(m._forward_hooks for m in net.modules())

def test_traceable_gives_everything_back():
    net = _chain()
    net[0].weight.requires_grad_(False); net[1].eval()
    net[2]._compiled_call_impl = call = lambda *_: 1/0
    net[4]._compiled_call_impl = None
    with torch.no_grad(), pytest.raises(KeyError), traceable(net):
        assert all(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())
        assert torch.is_grad_enabled() and net(x).requires_grad
        raise KeyError
    assert [n for n,p in net.named_parameters() if not p.requires_grad]==['0.weight'] and not net[1].training
    assert net[0].training and net[2]._compiled_call_impl is call

def _scores(net, criterion, learn=None):
    with opened(net, x), traceable(net), importance_by(criterion, learn) as importance:
        graph,groups = channel_groups(net, x)
        return {g.name: s for g,s in zip(groups, channel_scores(graph, groups, importance))}

def _same_order(a, b): assert a.argsort().tolist()==b.argsort().tolist()

def test_scores():
    torch.manual_seed(0)
    net = _chain()
    net[1].weight.data = torch.tensor([3., -1, .5, 7, -9, 2, 4, 6])
    for p in (1, 2):
        norm = lambda t: t.flatten(1).abs().pow(p).sum(1)
        s = _scores(net, f'l{p}')['3']
        last = net[6].weight.data.view(10, 6, 36).transpose(0, 1)
        _same_order(s, norm(net[3].weight.data)+norm(last))
    scale = net[1].weight.data.abs()
    torch.testing.assert_close(_scores(net, 'bn')['0'], scale/scale.mean())
    assert torch.equal(_scores(net, 'bn')['3'], _scores(net, 'l1')['3'])                   # no BatchNorm behind it
    a,b = (_scores(net, 'random') for _ in range(2))
    assert all(torch.equal(a[k], b[k]) and a[k].unique().numel()==len(a[k]) for k in a)
    scores = _scores(Late(), 'l1')
    assert len(scores['a'])==4 and len(scores['c'])==4 and len(scores['d'])==12
    with pytest.raises(ValueError, match="needs images and a loss"): _scores(net, Taylor())
    class Broken:
        def __call__(self, group): raise IndexError('far out')
    with traceable(net):
        graph,groups = channel_groups(net, x)
        with pytest.raises(ValueError, match="of layer '0' are worth \\(IndexError: far out\\)"):
            channel_scores(graph, groups, Broken())

def test_whole_channels():
    assert [whole_channels(o) for o in (3., 2.9999999999, 2.999, 3.5, 10*(1-.3), 10*(1-.9), .1+.2+.7)]==[3, 3, 2, 3,
        7, 1, 1]

@pytest.mark.parametrize('attack', [None, FGSM(.1)])
def test_taylor_is_the_gradient_over_its_batches(attack):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Dropout(), nn.Linear(4*36, 10))
    net.idle = nn.Parameter(torch.ones(2))
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    learn = Learner(digits_dls(n_train=142, bs=32, normalize=(.5,.25)), net, loss_func=nn.CrossEntropyLoss())
    for n in (1, 3):
        total = Taylor(attack, n_batches=n).gradients(learn)
        assert total[net.idle].tolist()==[0, 0] and net.training
        batches = training_batches_of(learn, n)
        expected = torch.zeros_like(net[0].weight)
        space = pixel_space(learn.dls)
        for xb,yb in batches:
            with evaluating(net):
                if attack is not None: xb = space.from_pixels(attack(space.wrap(net), space.to_pixels(xb), yb))
                expected += torch.autograd.grad(nn.CrossEntropyLoss()(net(xb), yb), net[0].weight)[0]
        torch.testing.assert_close(total[net[0].weight], expected)

def training_batches_of(learn, n):
    from fastai.torch_core import no_random
    with no_random(0):
        return [(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor)) for a,b in training_batches(learn, n)]

def test_examples_are_two_images():
    learn = Learner(digits_dls(n_train=142, normalize=(.5,.25)), _chain())
    images = example_images(learn)
    assert images.shape==(2, 1, 8, 8) and type(images) is torch.Tensor
    assert torch.equal(images, learn.dls.valid.one_batch()[0][:2].as_subclass(torch.Tensor))

# --- attention

def _vit():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.)
    return nn.Sequential(nn.Flatten(2), nn.Linear(64, 32), layer, nn.Flatten(), nn.Linear(32, 10))

def test_heads_are_scored_by_their_three_projections_and_the_one_behind():
    torch.manual_seed(0)
    net = _vit()
    with opened(net, x): pass
    for h in range(4):
        for part,which in enumerate(('q', 'k', 'v', 'out')):
            one = copy.deepcopy(net)
            m = one[2].self_attn
            inner,outer = m.in_proj.weight.data.view(3, 4, 8, 32),m.out_proj.weight.data.view(32, 4, 8)
            w = outer[:,h] if part==3 else inner[part,h]
            w.mul_(100)
            after = _scores(one, 'l1')['2.self_attn']
            assert after.argmax()==h and len(after)==4, (which, h)
    prune(net, {'2.self_attn': .5}, x)
    assert net[2].self_attn.num_heads==2 and net[2].self_attn.in_proj.out_features==48
    assert net[2].linear1.out_features==48 and net[1].out_features==32

def test_the_stream_of_a_transformer_stays():
    torch.manual_seed(0)
    net = _vit()
    assert [(g.name, g.n, type(g)) for g in _found(net)]==[('2.self_attn', 4, Heads), ('2.linear1', 48, Group)]

def test_what_is_tied_to_an_attention():
    net = _vit()
    with opened(net, x), traceable(net):
        graph,_ = channel_groups(net, x)
        stream,mlp,attention = net[1],net[2].linear1,net[2].self_attn
        assert _tied_to(graph, stream, {attention.out_proj})
        assert _tied_to(graph, net[2].linear2, {attention.out_proj, attention.in_proj})
        # who only reads it is not tied
        assert not _tied_to(graph, mlp, {attention.out_proj, attention.in_proj})
        assert not _tied_to(graph, stream, {attention.in_proj, net[4]})

# --- cuts

def test_the_least_important_channels_go():
    torch.manual_seed(0)
    net = _chain()
    order = _scores(net, 'l1')['0'].argsort()
    w = net[0].weight.detach().clone()
    prune(net, {'0': .5}, x)
    kept = sorted(order[4:].tolist())
    assert torch.equal(net[0].weight, w[kept]) and net[0].weight.requires_grad

def test_cuts_are_what_silencing_would_be():
    torch.manual_seed(0)
    net = _chain().eval()
    order = _scores(net, 'l1')['3'].argsort()[:3]
    silent = copy.deepcopy(net)
    silent[3].weight.data[order],silent[3].bias.data[order] = 0,0
    torch.testing.assert_close(prune(net, {'3': .5}, x)(x), silent(x))

def test_macs_by_bisection():
    torch.manual_seed(0)
    for share in (.2, .5, .8):
        net = cnn8(size=8)
        before = macs(net, x)
        prune(net, None, x, keep_macs=share)
        assert abs(macs(net, x)/before-share)<.02
    pair = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10))
    with pytest.raises(ValueError, match='keep_macs=0.75 cannot be had: the nearest that pruning reaches is 0.500'):
        prune(pair, None, x, keep_macs=.75)
    with pytest.raises(ValueError, match='keep_macs=0.03 cannot be had'): prune(_chain(), None, x, keep_macs=.03)
    net = cnn8(size=8)
    prune(net, None, x, keep_macs=.9, scope='global', floor=.5)
    with pytest.raises(ValueError, match='keep_macs=0.5 cannot be had'):
        prune(cnn8(size=8), None, x, keep_macs=.5, scope='global', floor=.9)

class Widths(Callback):
    def before_fit(self): self.seen = []
    def after_train(self): self.seen.append(self.model[0].out_channels)

def _learner(): return Learner(digits_dls(n_train=142, bs=64), _chain(), opt_func=SGD)

def _fit(learn, n, cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, cbs=cbs)

@pytest.mark.parametrize('schedule,widths', [('one_shot', [4, 4, 4, 4]), ('iterative', [7, 6, 5, 4]),
    ('cubic', [5, 4, 4, 4])])
def test_schedules(schedule, widths):
    learn,seen = _learner(),Widths()
    _fit(learn, 4, [StructuredPruning(.5, schedule), seen])
    assert seen.seen==widths and learn.model[3].out_channels==3
    assert {k: [f(t) for t in (0, .5, 1)] for k,f in schedules.items()}==dict(one_shot=[1, 1, 1],
        iterative=[0, .5, 1], cubic=[0, .875, 1])

def test_pruning_in_a_fit():
    learn,cb = _learner(),StructuredPruning(.5)
    assert cb.schedule is schedules['iterative']
    with pytest.raises(ValueError, match="'sometimes' is unknown: use one of one_shot, iterative, cubic"):
        StructuredPruning(.5, 'sometimes')
    _fit(learn, 1, [cb])
    assert learn.model[0].out_channels==4 and cb.pruner is None
    other = _learner()
    with other.no_bar(), other.no_logging():
        other.add_cb(StructuredPruning(.5))
        other.lr_find(show_plot=False, num_it=15)
        other.get_preds()
    assert other.model[0].out_channels==8

@pytest.mark.parametrize('mom', [0, .9])
def test_the_state_follows_the_weights(mom):
    torch.manual_seed(0)
    learn = Learner(digits_dls(n_train=142, bs=64), _chain(), opt_func=lambda *args, **kw: SGD(*args, mom=mom, **kw))
    _fit(learn, 1, [])
    first,extra = learn.model[0].weight,torch.arange(3.)
    old,state = first.detach().clone(),learn.opt.state[first]
    averages = state['grad_avg'].clone() if mom else None
    # what is not shaped like the weight goes along as it is
    state['steps'],state['note'] = 7,extra
    learn.prune(.5)
    new = learn.model[0].weight
    kept = [next(i for i in range(8) if torch.equal(old[i], w)) for w in new]
    mine = {id(p) for ps in learn.opt.param_lists for p in ps}
    assert mine=={id(p) for p in learn.model.parameters()} and len(kept)==4
    if mom: assert torch.equal(learn.opt.state[new]['grad_avg'], averages[kept])
    _fit(learn, 1, [])

def test_macs_are_reached_beyond_an_impossible_share():
    "Share .875 would leave nothing of 6 channels, and .8 leaves what is asked for"
    def make():
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    x = torch.rand(2, 1, 8, 8)
    by_share = prune(make(), .8, x)
    kept = macs(by_share, x)/macs(make(), x)
    by_macs = prune(make(), None, x, keep_macs=kept)
    assert macs(by_macs, x)==macs(by_share, x)
    with pytest.raises(ValueError, match='keep_macs=0.01 cannot be had: the nearest that pruning reaches is 0'):
        prune(make(), None, x, keep_macs=.01)
