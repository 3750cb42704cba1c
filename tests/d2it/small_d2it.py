"""A run of seconds."""

# d2it.train's flags for a run of seconds, with all stages in it.
SMALL = ("--preset d2it-tiny --dvae_width 8 --content_width 32 --content_depth 1 --refine_depth 1 "
         "--content_heads 2 --grain_width 32 --grain_depth 1 --grain_heads 2 --batch_size 8 "
         "--dvae_steps 5 --grain_steps 5 --content_steps 5 --save_every 2 --log_every 1 "
         "--sample_every 4 --device cpu").split()
