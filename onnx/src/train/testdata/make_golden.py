#!/usr/bin/env python3
"""Trajectories of PyTorch's optimizers, written to optimizers.json beside this script.

Made with Python 3.11 and torch 2.15.0 (CPU, one tensor at a time: foreach and fused off).
"""
import json, os
import torch

N, STEPS = 6, 25
cases = []
for kind, options in [
    ('sgd', dict(momentum=0.0, nesterov=False, weight_decay=0.0)),
    ('sgd', dict(momentum=0.9, nesterov=False, weight_decay=0.05)),
    ('sgd', dict(momentum=0.8, nesterov=True, weight_decay=0.0)),
    ('adamw', dict(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)),
    ('adamw', dict(betas=[0.8, 0.95], eps=1e-3, weight_decay=0.3)),
]:
    g = torch.Generator().manual_seed(7)
    w = torch.nn.Parameter(torch.randn(N, generator=g))
    case = {'optimizer': kind, 'options': options, 'start': w.tolist(), 'steps': []}
    make = {'sgd': torch.optim.SGD, 'adamw': torch.optim.AdamW}[kind]
    optimizer = make([w], lr=0.1, foreach=False, **options)
    for step in range(STEPS):
        rate = float(torch.tensor(0.05 * (1 - step / STEPS)))
        optimizer.param_groups[0]['lr'] = rate
        w.grad = torch.randn(N, generator=g) * torch.tensor([1.0, 1e-4, 10.0, 1.0, 0.0, 1.0])
        case['steps'].append({'rate': rate, 'gradient': w.grad.tolist()})
        optimizer.step()
        case['steps'][-1]['after'] = w.tolist()
    cases.append(case)
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, 'optimizers.json'), 'w') as f:
    json.dump(cases, f, separators=(',', ':')); f.write('\n')
