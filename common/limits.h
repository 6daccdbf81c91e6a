/* limits.h: every hard limit of riverrun, with its reason. What input can reach is checked where the input is read. */
#ifndef RIVERRUN_LIMITS_H
#define RIVERRUN_LIMITS_H

#define LIMIT_CONFIG_LINE 4096 /* bytes in a config line: longer ones are refused, never cut */
#define LIMIT_CONFIG_NAME 49   /* bytes in the name of a config's section or key: inih cuts longer section names */
#define LIMIT_CONFIG_BYTES (1 << 20) /* a config is written by people */
#define LIMIT_JSON_BYTES (64 << 20)  /* tokenizer.json of 200,000 entries is about 20 MB */
#define LIMIT_JSON_LINE (256 << 20)  /* bytes in a line of JSON lines, which is held whole; documents have some MB */
#define LIMIT_NAME 192               /* bytes in a tensor's, block's or source's name, with the final 0 */
#define LIMIT_PATH 4096              /* PATH_MAX on Linux */
#define LIMIT_LAYERS 1024            /* blocks in a model; the deepest published one has 128 */
#define LIMIT_BLOCK_KINDS 16         /* [block.NAME] sections in a config */
#define LIMIT_GROUPS 64              /* [group.NAME] sections in a config */
#define LIMIT_RAMP_STAGES 1024       /* batch sizes that a ramp goes through */
#define LIMIT_SOURCES 64             /* [source.NAME] sections in a config */
#define LIMIT_TASKS 64               /* [task.NAME] sections in a config */
#define LIMIT_VOCAB (1 << 24)        /* rows of an embedding */
#define LIMIT_RANKS 4096             /* processes in one run */

#endif
