"""The renderer stage: conditions, denoising and VAE decoding of ACE-Step 1.5 for many songs at once.

The way of a song: `renderer` takes it, `tasks` refuses what makes no sense, `preparation` turns it into contexts and conditions
(`prompts`, `conditions`, `precision`, `window`), `engine` lets `sampler` ask for velocities and answers many songs with one evaluation of
`denoiser` (`layer`, `attention`), and `vae` decodes what comes out, piece by piece. `admission` and `budget` decide what fits and what shares a
step, `residency` what is on the card.

Where diffusers 0.42.1 and ACE-Step's own code disagree, or neither is right for a service, the renderer does this:

* `audio_cover_strength` ends the cover after that share of the steps and goes on as text2music, as ACE-Step does, at no extra cost.
* `cfg_interval_start` and `_end` are compared with t, which falls from 1 to 0, as ACE-Step does.
* Audio is encoded to the mean of the posterior, and all noise of an item comes from a CPU generator seeded with its seed: the same
  request is the same song on every device.
* Repainting crossfades inside its window, not outside: the latents outside are the source's, bit for bit, in every mode, and unless
  the mode is `aggressive` so are the samples. `conservative` holds the source during all steps, `aggressive` during none, `balanced`
  during a share of 1 - `repaint_strength`.
  The crossfades, too, follow mode and strength (at most 25 frames and 50 ms), unless the request names its own.
* What is made in a window is turned down to ±1 before it is put into its source, whose samples stay as they are.
* `chunk_mask_mode` `explicit` shows the model the window; `auto` shows it a window that is everything, which is what ACE-Step's code
  does with it. Either way only the window changes. Tasks without a window have a mask of ones.
* Stochastic sampling re-noises to the next time of the schedule, so that `shift` and `timesteps` hold for it too.
* The time of each step stays in float32 in every precision.
"""
