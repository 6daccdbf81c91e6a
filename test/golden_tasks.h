/* golden_tasks.h: two rows of every kind of generated task, written down: a run must see the same samples with every
 * later version. A token with its target is TOKEN>TARGET. Included by test_data_task.c alone. */
#ifndef RIVERRUN_GOLDEN_TASKS_H
#define RIVERRUN_GOLDEN_TASKS_H

static const struct {
    const char *kind, *options;
    const char *rows[2]; /* samples 0 and 1 for training, seed 11 */
} golden_tasks[] = {
    {"selective_copying", "length=12\ntokens=3",
     {"8 14 0 0 0 0 0 4 0 15>8 15>14 15>4",
      "0 0 0 0 0 13 7 13 0 15>13 15>7 15>13"}},
    {"induction_heads", "length=10",
     {"12 9 12 13 1 14 12 5 14>12",
      "0 9 0 0 2 14 10 1 14>10"}},
    {"mqar", "length=12\npairs=2\nvocab=16",
     {"3 13 7 11 3>13 13 1 11 7>11 0 11 8",
      "3 13 4 9 7 0 6 1 3>13 5 4>9 0"}},
    {"parity", "length=13",
     {"1 1>1 0 0 0 0 0 0 0 0 0 0",
      "2 2 2 1 2>1 0 0 0 0 0 0 0"}},
    {"even_pairs", "length=13",
     {"2 2 1 1 1>2 0 0 0 0 0 0 0",
      "1 1 1 1 1 2 2>2 0 0 0 0 0"}},
    {"cycle_navigation", "length=13",
     {"2 1 1 1 2 2 1 1 3>6 0 0 0",
      "3 3 1 1 3 2 1 1 3 1 2>7 0"}},
    {"modular_arithmetic", "length=13",
     {"7 3 5 3 9 3 8 4>5 0 0 0 0",
      "5 3 7 1 8 3 8 3 8 4>7 0 0"}},
    {"modular_arithmetic_brackets", "length=13",
     {"5 8 1 9 6 2 9 4>8 0 0 0 0",
      "11 1 7 4>11 0 0 0 0 0 0 0 0"}},
    {"majority", "length=13",
     {"45 51 4 41 29 4 54 57 1>4 0 0 0",
      "26 16 29 12 2 54 63 3 22 50>2 0 0"}},
    {"majority_count", "length=13",
     {"52 18 53 32 47>1 0 0 0 0 0 0 0",
      "56 40 7 32 32 2 4 59>2 0 0 0 0"}},
    {"bucket_sort", "length=13",
     {"4 2 7 9 9>2 0>4 0>7 0>9 0>9 0 0 0",
      "8 6 5 1 7>1 0>5 0>6 0>7 0>8 0 0 0"}},
    {"missing_duplicate", "length=13",
     {"4 7 10 7>4 0 0 0 0 0 0 0 0",
      "1 2 5 6 2 1 2 10 6 2>5 0 0"}},
    {"repetition", "length=13",
     {"3 8 11>3 0>8 0 0 0 0 0 0 0 0",
      "2 10 8 2 11>2 0>10 0>8 0>2 0 0 0 0"}},
    {"reverse", "length=13",
     {"7 10 11>10 0>7 0 0 0 0 0 0 0 0",
      "3 6 1 10 4 11>4 0>10 0>1 0>6 0>3 0 0"}},
    {"odds_first", "length=13",
     {"8 10 7 1 6 2 11>8 0>7 0>6 0>10 0>1 0>2",
      "4 2 9 11>4 0>9 0>2 0 0 0 0 0 0"}},
    {"set", "length=13",
     {"82 42 127>82 0>42 0 0 0 0 0 0 0 0",
      "74 37 80 93 127>74 0>37 0>80 0>93 0 0 0 0"}},
};

#endif
